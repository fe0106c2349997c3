"""Keep the components whose removal would raise the loss most.

What it does
    Predicts the change of the loss from removing each component alone, from its gate's gradient over the rows:
    -dL/dg_i, which has a sign and may call a component harmful, plus half the curvature, from the gradient's variance.
    That per number it holds is the score.

When to use it
    In `dynlora prune`, on rows that were held out, where the adapter may have learned what does harm there. The sign
    alone is worse than chance (scripts/bench/NOTES.md): it calls the largest components harmful, since a little less of
    them would help, and nothing of them would not.

Reference
    Taylor pruning, Molchanov et al. 2017 (arXiv 1611.06440), with the second-order term of optimal brain damage.
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
    """The predicted rise of the loss, per number. [K]"""
    return gradients.removal_K(pool) / pool.costs_K()
