"""Keep the components that matter for what really flows through the layers.

What it does
    Weighs the error of a removal D by the covariance C of the layer's inputs and by that of the loss's gradient at its
    outputs, Γ: the components are turned into the singular directions of Γ^½ ΔW C^½, of which dropping the last k is
    the best approximation of the change of the loss to second order. A component's worth is its share of it, per
    number it holds.

When to use it
    In `dynlora prune`, wherever there are rows to look at; the best of the policies there. It needs only covariances
    of k x k for a layer of k components. With the inputs' side alone, errors of different layers could not be
    compared, and that is measurably worse than no data (scripts/bench/NOTES.md).

Reference
    SVD-LLM (arXiv 2403.07378) for the inputs' side, K-FAC (arXiv 1503.05671) for both; see pruning/covariances.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.covariances import Covariances

after_training_only = True


def observer(options: Any, training: bool) -> Covariances:  # noqa: ARG001
    """Covariances of what flows through the layers."""
    return Covariances()


def scores(pool: Pool, observed: Covariances, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The component's share of the loss's curvature, per number. [K]"""
    return observed.energies_K / pool.costs_K()
