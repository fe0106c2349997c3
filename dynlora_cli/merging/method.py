"""What a merge method is: a file in merging/methods/ with these names; `dynlora merge --method` takes its file's name.

    combine_layer(parts, way, generator) -> Factors | Tensor
        One layer of the result, from `parts`: weight and factors of each adapter that has this layer. Either factors,
        or a dense update [O, I], whose best factors are then found. `generator` is for methods that draw lots: it is
        seeded once with `--seed`, and used for all layers in turn.

    weights(given) -> weights
        Optional: what becomes of the weights of the adapters; without it they stay as they are.

    lossless = True
        Optional: the result is cut only where the person names a budget. Others are cut to the size of the largest
        adapter.

    adds = True
        Optional: it adds the weighted updates up, before any cut; biases and rows of tables are added up likewise.

    OPTIONS
        Optional: what `--set KEY=VALUE` may be, see config/options.py. They come as attributes of `way.options`.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.types import Section
from dynlora_cli.lora.svd_basis import svd_factors

Parts = Sequence[tuple[float, Factors]]


@dataclass(frozen=True)
class Way:
    """How adapters are combined.

    Attributes:
        method: a file of merging/methods/, by its name.
        weights: one for each adapter; None: 1 each.
        budget: of the result, as in a recipe; a share is of all adapters together; None: what the largest adapter
            holds, and for a lossless method what it takes.
        density: share of the entries that ties and dare keep.
        seed: of methods that draw lots.
        options: those that the method itself brings; None: their defaults.
    """

    method: str = "exact"
    weights: Sequence[float] | None = None
    budget: Budget | None = None
    density: float = 0.5
    seed: int = 0
    options: Section | None = None


class Method(Protocol):
    """The shape of a method's module; all but `combine_layer` may be left out."""

    lossless: bool
    adds: bool

    def combine_layer(self, parts: Parts, way: Way, generator: torch.Generator) -> Factors | Tensor:
        """One layer of the result."""

    def weights(self, given: Sequence[float]) -> Sequence[float]:
        """What becomes of the weights of the adapters."""


def side_by_side(parts: Parts) -> Factors:
    """Σ w B A as one pair of factors; in SVD form where that needs fewer components."""
    a = torch.cat([factors.a_CI for _, factors in parts])
    b = torch.cat([weight * factors.b_OC for weight, factors in parts], 1)
    if a.shape[0] > min(a.shape[1], b.shape[0]):
        a, b = svd_factors(a, b)
    return Factors(a, b, embedding=parts[0][1].embedding)
