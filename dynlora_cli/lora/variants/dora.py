"""DoRA: the sum of components changes a weight's direction, a trained magnitude per output its length.

What it does
    W' = m · (W + s BA) / ‖W + s BA‖, norms over the inputs of each output, with m = ‖W‖ at the start. Pruning removes
    components below the magnitude; magnitudes are not counted in the budget. The norm comes from thin products, and
    ‖W‖ is computed once, so a step costs less than with the dense BA. QDoRA is this on a base in 4 bits.

When to use it
    Where a little more than LoRA of the same rank is wanted: one number more per output. At equal size, fewer numbers
    in m and more in components did as well here (scripts/bench/RESULTS.md).

Reference
    DoRA, arXiv 2402.09353, equations 5 and 11: the norm carries no gradient. Saved as PEFT saves it (`use_dora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from dynlora_cli.lora.dora import DoraLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put
from dynlora_cli.models.linear import dense_weight

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

has_components = True
rounds = True
takes = ("alpha", "dropout", "freeze_a", "lora_plus_ratio")
saved_as = "dora"
starts = ("orthogonal", "eva")
Layer = DoraLinear
in_modules_only = True


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it, with its magnitude."""
    return put(model, targets, start, options, seed, _layer)


def _layer(base: nn.Module, scale: float, dropout: float) -> DoraLinear:
    bias: Any = base.bias
    layer = DoraLinear(base, scale, dense_weight(base).norm(dim=1), partial(dense_weight, base), bias, dropout)
    layer.magnitude_O.requires_grad_(True)
    return layer
