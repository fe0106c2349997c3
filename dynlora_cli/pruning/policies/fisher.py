"""Keep the components that the loss is most sensitive to.

What it does
    Averages the square of each gate's gradient, dL/dg_i = <a_i, dL/da_i>, over the optimizer steps since the last
    event: F_i, to which the loss of removing the component is proportional. F_i per number that the component holds
    is what the budget buys, so that is the order; the score is its root. The square, not the sign: near a minimum the
    signed mean is noise. It costs nothing beyond the gradients that exist, and has no bias for large layers, since it
    is in units of the loss.

When to use it
    The default. It needs training steps between events; where there are only a few, `magnitude` is nearly as good.

Reference
    The diagonal of the empirical Fisher information, as in optimal brain surgery; AdaLoRA (arXiv 2303.10512) smooths
    |w · dL/dw| instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.signals import GateGradients


def observer(options: Any, training: bool) -> GateGradients:  # noqa: ARG001
    """Averages of each gate's gradient."""
    return GateGradients.of(training=training)


def scores(pool: Pool, gradients: GateGradients, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Root of the averaged squared gate gradient per number. [K]"""
    return (gradients.square(pool) / pool.costs_K()).sqrt()
