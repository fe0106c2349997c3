"""The weighted sum of the updates.

What it does
    Puts the factors of the adapters side by side. Ranks add up and nothing is lost; a budget cuts the result.

When to use it
    When size does not matter, or to find out how much a smaller result loses.

Reference
    Σ w B A = [w₁B₁ w₂B₂] [A₁; A₂].
"""

from __future__ import annotations

import torch

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.merging.method import Parts, Way, side_by_side

lossless = True
adds = True


def combine_layer(parts: Parts, way: Way, generator: torch.Generator) -> Factors:  # noqa: ARG001
    """The factors side by side."""
    return side_by_side(parts)
