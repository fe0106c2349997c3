"""Keep the first components of every layer, the same share of each.

What it does
    Cuts every layer from its end and changes no number of what stays. Components are taken in the order in which they
    stand in the files, and are not turned into another basis first.

When to use it
    For an adapter that was trained so that any first part of it is an adapter: `rank.elastic: true`, or variant dylora.
    Anywhere else the order says nothing.

Reference
    DyLoRA, arXiv 2210.07558, which reads a rank off one training in this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool

after_training_only = True
as_they_stand = True


def scores(pool: Pool, observed: None, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Minus the share of the layer's components that stand before this one. [K]"""
    return torch.cat([-torch.arange(count, dtype=pool.values.dtype) / max(1, count) for count in pool.counts.values()])
