"""VeRA: all layers share one pair of frozen random matrices; only two vectors of each layer are trained.

What it does
    ΔW = diag(b) B diag(d) A with A and B random, the same for all layers and cut to each layer's shape; d is 0.1 and b
    is 0 at the start. A component is one entry of d, so a rank of 128 is an average of 128 entries, and pruning removes
    entries. b has one number per output and is not counted in the budget, as magnitudes are not. There is no s.

When to use it
    Where the trained numbers must be very few: with `rank.budget: 128` or so, and a learning rate ten times LoRA's or
    more. It takes the time and memory of a LoRA of its rank.

Reference
    VeRA, arXiv 2310.11454, equation 2. A and B are those of PEFT for `projection_prng_key` = the recipe's seed. Saved
    in PEFT's own form, with zeros for the entries of d that are gone, and with A and B, which are most of the file:
    4 r (max d_in + max d_out) bytes, 29 MB for r = 256 and matrices of 14336 x 14336.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put
from dynlora_cli.lora.vera import VeraLinear
from dynlora_cli.models.linear import linear_shape

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 9.0  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("dropout",)
saved_as = "vera"
Layer = VeraLinear


def projections(rank: int, d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, d_in] and B [d_out, rank]: kaiming_uniform, drawn in this order, as PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return kaiming(rank, d_in), kaiming(d_out, rank)


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    shapes = [linear_shape(target) for target in targets.values()]
    widest = max(d_in for d_in, _ in shapes), max(d_out for _, d_out in shapes)
    device = next(model.parameters()).device
    a, b = (each.to(device) for each in projections(max(start.counts.values()), *widest, seed))

    def layer(base: nn.Module, scale: float, dropout: float) -> VeraLinear:  # noqa: ARG001 - b and d are the scale
        return VeraLinear(base, dropout, (a, b), seed)

    return put(model, targets, start, options, seed, layer)
