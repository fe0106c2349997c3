"""Keep the largest components.

What it does
    Scores a component by the Frobenius norm of its share of the update, s·‖b_i‖·‖a_i‖, per number it holds. The
    components are turned into the SVD basis first, so within one layer this keeps the best approximation of the update.

When to use it
    Where gradients are few or noisy, and as the plain alternative to `fisher`.

Reference
    LoRA-Squeeze (arXiv 2602.10993) and PARA (arXiv 2604.27796) cut by singular value after training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.gradients import GateGradients

needs = "values"


def scores(pool: Pool, gradients: GateGradients, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Size of the component's share of the update, per number. [K]"""
    return pool.magnitudes_K() / pool.costs_K()
