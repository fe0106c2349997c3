"""LoRA as a sum of rank-1 components.

What it does
    Adds s·Σ b_i a_iᵀ to every target layer, with B = 0 at the start. `rank.init` above the budget: the components are
    pruned while training. `rank.init` equal to the budget: plain LoRA, or rsLoRA with scaling `rslora` and alpha 16.

When to use it
    The default.

Reference
    LoRA, arXiv 2106.09685: s = alpha/r; rsLoRA, arXiv 2312.03732: s = alpha/√r. Here r is the budget's average rank,
    constant for the run, so that removing one component never rescales the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.nested import NestedLinear
from dynlora_cli.lora.pissa import layer_kind
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

has_components = True
rounds = True
takes = ("alpha", "dropout", "freeze_a", "lora_plus_ratio")
starts = ("orthogonal", "eva", "pissa", "loftq", "inflora")
Layer = ComponentLinear


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    nested = partial(NestedLinear, seed=seed) if start.elastic else None
    return put(model, targets, start, options, seed, nested or layer_kind(options, Layer))
