"""HiRA: the sum of components multiplies the weight, entry by entry, so that a few of them change it in all directions.

What it does
    W' = W ∘ (1 + s BA), with B = 0 at the start. Scores, pruning and the turn into the SVD basis are those of BA. A
    step makes W ∘ BA anew in every layer, forward and backward, at the cost of C more products of the size of W; on a
    quantized base W is dequantized for it.

When to use it
    Where LoRA's rank is the limit. An entry of BA counts as a share of a weight, which is a small number, so the best
    learning rate is several times LoRA's. No server reads it: `dynlora merge` makes a plain model of it.

Reference
    HiRA, ICLR 2025 (openreview TwJrTz9cRS). Saved in PEFT's own form, s in B. All layers are filled up to the largest
    rank with components of zeros, which change nothing and go again at reading: PEFT 0.21 does not heed HiRA's
    `rank_pattern` at linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from dynlora_cli.lora.hira import HiraLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put
from dynlora_cli.models.linear import dense_weight

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 6.0  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio")
saved_as = "hira"
Layer = HiraLinear


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, _layer)


def _layer(base: nn.Module, scale: float, dropout: float) -> HiraLinear:
    return HiraLinear(base, scale, partial(dense_weight, base), dropout)
