"""Keep the largest components of every layer, the same number in each.

What it does
    Within a layer components go by the size of their share of the update; between layers the rank stays equal, as far
    as the budget divides. With `pruning.gauge`, which turns the factors into the SVD basis after each event, the run is
    LoRA-Squeeze's rank annealing: train wide, truncate by singular values, go on.

When to use it
    Where a uniform rank is asked for, by a server that pads to the largest one, say; and as the control that tells what
    it is worth to let layers differ.

Reference
    LoRA-Squeeze (arXiv 2602.10993), In-Squeeze.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool


def scores(pool: Pool, observed: None, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Minus the number of components of the same layer that are larger. [K]"""
    per_layer = pool.magnitudes_K().split(list(pool.counts.values()))
    places = [sizes_C.argsort(descending=True, stable=True).argsort() for sizes_C in per_layer]
    return -torch.cat(places).to(pool.values.dtype)
