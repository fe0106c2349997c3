"""The weighted sum of the updates, cut to a budget.

What it does
    Adds the updates up and keeps the largest singular directions, with one threshold over all layers.

When to use it
    When the result may not be larger than one of the adapters.

Reference
    Eckart and Young 1936: a cut by singular values loses the least.
"""

from __future__ import annotations

import torch

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.merging.method import Parts, Way, side_by_side

adds = True


def combine_layer(parts: Parts, way: Way, generator: torch.Generator) -> Factors:  # noqa: ARG001
    """The factors side by side."""
    return side_by_side(parts)
