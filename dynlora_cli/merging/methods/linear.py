"""The weighted mean of the updates, cut to a budget.

What it does
    Divides the weights by their sum, adds the updates up, and keeps the largest singular directions.

When to use it
    For adapters of one task, trained on other data or with other seeds.

Reference
    Wortsman et al. 2022, 2203.05482, of whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.errors import UsageError
from dynlora_cli.merging.method import Parts, Way, side_by_side

adds = True


def weights(given: Sequence[float]) -> list[float]:
    """Each as a share of all.

    Raises:
        UsageError: they sum to 0.
    """
    total = sum(given)
    if total == 0:
        raise UsageError("--weights sum to 0, and linear divides by their sum", "use --method svd")
    return [weight / total for weight in given]


def combine_layer(parts: Parts, way: Way, generator: torch.Generator) -> Factors:  # noqa: ARG001
    """The factors side by side."""
    return side_by_side(parts)
