"""Keep the largest components.

What it does
    The components are turned into the SVD basis first, so σ_i = s·‖b_i‖·‖a_i‖ are the singular values of the layer's
    update, and within one layer this keeps its best approximation. Between layers neither σ² itself nor its share of
    the layer decides: a large update may be of a layer that matters little, and a share says nothing about a layer
    that hardly moved. The score stands between the two, σ² / ‖ΔW‖^1.5 / (d_in + d_out)^0.25; the exponents are
    measured (scripts/bench/NOTES.md).

When to use it
    Where gradients are few or noisy, in `dynlora prune` where there are no rows to look at, and as the plain
    alternative to `fisher`.

Reference
    LoRA-Squeeze (arXiv 2602.10993) and PARA (arXiv 2604.27796) cut by singular value after training; PEFT's
    `convert_to_lora` keeps the same share of every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool

LAYER_POWER = 0.75  # of ‖ΔW‖²: 0 would compare σ² between layers, 1 its share of the layer
COST_POWER = 0.25


def scores(pool: Pool, observed: None, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Size of the component's share of the update, against its layer and its cost. [K]"""
    squares_K, layers_K = pool.magnitudes_K().square(), pool.layers_K()
    totals = torch.zeros(len(pool.layers), device=squares_K.device).index_add_(0, layers_K, squares_K)
    totals = totals.clamp_min(torch.finfo(totals.dtype).tiny)
    return squares_K / totals[layers_K] ** LAYER_POWER / pool.costs_K() ** COST_POWER
