"""DyLoRA: components in order, so that the first few of a layer are an adapter of their own.

What it does
    In every training step all layers use only their first components; how large a share is drawn anew each time. What
    stands early is trained more often and comes to matter most. Pruning in training cuts each layer from its end. The
    first components of each saved layer are an adapter of that rank: `dynlora prune --policy prefix` cuts there.

When to use it
    Where one training has to serve several sizes.

Reference
    DyLoRA, arXiv 2210.07558, without its option to train the last of the drawn components alone; s is constant here,
    where the paper divides by the drawn rank. Saved as the plain LoRA that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from dynlora_cli.lora.nested import NestedLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 0.7  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio")


Layer = NestedLinear


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, partial(Layer, seed=seed))
