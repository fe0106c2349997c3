"""TIES: trim, elect signs, and average what agrees.

What it does
    Keeps the largest entries of each update, as many as `--density` says. Each entry of the result has the sign of the
    weighted sum, and is the weighted mean of the updates that have that sign there.

When to use it
    For adapters of different tasks, which would cancel each other out in a plain sum.

Reference
    Yadav et al. 2023, 2306.01708.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.merging.method import Parts, Way


def combine_layer(parts: Parts, way: Way, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The mean of the entries that agree. [O, I]"""
    trimmed = [(weight, _trimmed(factors.delta_OI(), way.density)) for weight, factors in parts]
    sign = sum(weight * delta for weight, delta in trimmed).sign()  # type: ignore[union-attr]
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, delta in trimmed:
        agrees = ((weight * delta).sign() == sign) & (delta != 0)
        total += torch.where(agrees, weight * delta, 0.0)
        agreeing += torch.where(agrees, abs(weight), 0.0)
    return total / agreeing.clamp_min(torch.finfo(total.dtype).tiny)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """The update with this share of its entries, the largest, and zeros for the others."""
    keep = max(1, round(density * delta.numel()))
    smallest = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0.0)
