"""DARE: drop entries by lot, and make the others larger.

What it does
    Each entry of each update stays with probability `--density`, and is divided by it; then the updates are added up.
    `--seed` decides the lot.

When to use it
    For several adapters whose updates have many small entries.

Reference
    Yu et al. 2023, 2311.03099.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.merging.method import Parts, Way


def combine_layer(parts: Parts, way: Way, generator: torch.Generator) -> Tensor:
    """The sum of what stays. [O, I]"""
    total = torch.zeros(parts[0][1].b_OC.shape[0], parts[0][1].a_CI.shape[1])
    for weight, factors in parts:
        stays = torch.rand(total.shape, generator=generator) < way.density
        total += torch.where(stays, factors.delta_OI() * (weight / way.density), 0.0)
    return total
