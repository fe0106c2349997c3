"""Keep the components whose numbers the loss reacts to steadily: AdaLoRA's score.

What it does
    For every single number w of the factors averages I = |w · dL/dw| and its spread U = |I - average of I|; I·U is the
    number's score, and a component's is the mean over a_i, plus that over b_i, plus that of its gate where it has one.

When to use it
    With `adapter.variant: adalora`, to train as AdaLoRA does, and to compare. It costs two averages of the size of the
    pool, where `fisher` costs one number per component.

Reference
    AdaLoRA, arXiv 2303.10512, equations 8 to 11, with its β1 = β2 = 0.85.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.signals import EntryAverages


def observer(options: Any, training: bool) -> EntryAverages:  # noqa: ARG001
    """Averages over every single number."""
    return EntryAverages()


def scores(pool: Pool, entries: EntryAverages, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Importance times uncertainty, in means over the component's parts. [K]"""
    parts = zip(pool.layers.values(), entries.products(pool), strict=True)
    return torch.cat([layer.mean_parts_C(a_CI, b_OC) for layer, (a_CI, b_OC) in parts])
