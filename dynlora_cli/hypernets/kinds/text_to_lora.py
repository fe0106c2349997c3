"""A network that writes every number of an adapter's factors from a description, layer by layer.

All heads read the trunk (hypernets/trunk.py) and are linear maps without a bias, one for each module. Head L writes all
of A and B at once, C(I + O) numbers. Head M writes A and B one after the other, told apart by a learned vector that the
trunk is given, C·max(I, O) numbers. Head S writes one component's row of A or B at a time, told by a learned vector of
its number as well, max(I, O) numbers. The shorter of the two is cut off.

What is written lies on top of an offset, so that an untrained network writes a plain LoRA: A random, B zero. Where
adapters are reconstructed, the offset is their mean, and what is written are z-scores: it is first multiplied by the
spread of each number over the adapters.

Source: Charakorn et al. 2025, Text-to-LoRA (arXiv 2506.06105), and its code, with which heads and sizes are equal.

Dimensions, as suffixes of names:
    B  descriptions      C  components of a layer      M  places of one module      E  adapters
    I  inputs of a layer (d_in)      O  outputs (d_out)      D  numbers of a description's vector
    Z  the trunk's latent      H  features that heads write from
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_cli.hypernets.hypernet import Hypernet, Place, Written, by_module
from dynlora_cli.hypernets.trunk import Trunk

READS = "description"
SPREAD = "spread_a_MCI"  # a tensor that networks have which reconstruct, and others not
Factors = tuple[Tensor, Tensor]  # a_CI and b_OC, the scale in them


class Head(nn.Module):
    """What writes for the layers of one module.

    Args:
        places: those layers, M of them.
        hidden: H.
        outputs: numbers that are written at once.
        learned: the offset trains, too.

    Attributes:
        offset_a_MCI, offset_b_MOC: what lies below what is written.
        spread_a_MCI, spread_b_MOC: what it is multiplied by; None: 1.
    """

    offset_a_MCI: Tensor
    offset_b_MOC: Tensor
    spread_a_MCI: Tensor | None
    spread_b_MOC: Tensor | None

    def __init__(self, places: Sequence[Place], hidden: int, outputs: int, *, learned: bool) -> None:
        super().__init__()
        first = places[0]
        self.linear = nn.Linear(hidden, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)
        a_MCI = torch.empty(len(places), first.rank, first.d_in)
        nn.init.uniform_(a_MCI, -1 / math.sqrt(first.d_in), 1 / math.sqrt(first.d_in))  # as PEFT starts A
        b_MOC = torch.zeros(len(places), first.d_out, first.rank)
        for name, value in (("offset_a_MCI", a_MCI), ("offset_b_MOC", b_MOC)):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer(SPREAD, None)
        self.register_buffer("spread_b_MOC", None)

    def forward(self, a_BMCI: Tensor, b_BMCO: Tensor) -> Factors:
        """Rows as they were written, on top of the offset: [B, M, C, I] and [B, M, O, C]."""
        b_BMOC = b_BMCO.mT
        if self.spread_a_MCI is not None and self.spread_b_MOC is not None:
            a_BMCI, b_BMOC = a_BMCI * self.spread_a_MCI, b_BMOC * self.spread_b_MOC
        return self.offset_a_MCI + a_BMCI, self.offset_b_MOC + b_BMOC

    def stand_on(self, a_EMCI: Tensor, b_EMOC: Tensor) -> None:
        """Take the mean of adapters for the offset, and the spread of each number over them."""
        with torch.no_grad():
            self.offset_a_MCI.copy_(a_EMCI.mean(0))
            self.offset_b_MOC.copy_(b_EMOC.mean(0))
            self.spread_a_MCI, self.spread_b_MOC = (x.std(0).to(self.linear.weight) for x in (a_EMCI, b_EMOC))

    def make_room(self) -> None:
        """Have spreads, whatever they are."""
        self.spread_a_MCI = torch.ones_like(self.offset_a_MCI.detach())
        self.spread_b_MOC = torch.ones_like(self.offset_b_MOC.detach())


class Vectors(nn.Module):
    """Learned vectors of the latent's width, normalised: what a head writes, told to the trunk."""

    def __init__(self, count: int, latent: int) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(count, latent), nn.LayerNorm(latent)

    def forward(self, which: slice) -> Tensor:
        """[count, Z]"""
        out: Tensor = self.norm(self.table.weight[which])
        return out


class Net(Hypernet):
    """The network; see the head of this file. `options.head` is L, M or S."""

    def __init__(self, places: Sequence[Place], options: Any, width: int, scale: float) -> None:
        super().__init__(places, options, width, scale)
        self.form, self.regular = options.head, options.written_penalty > 0
        self.trunk = Trunk(places, width, options.latent_size, options.hidden_size)
        self.of_module = by_module(places)
        self.heads = nn.ModuleList(
            Head(own, options.hidden_size, self._outputs(own[0]), learned=options.ab_offset == "learned")
            for own in self.of_module.values()
        )
        if self.form != "L":
            self.sides = Vectors(2 * len(self.heads), options.latent_size)
        if self.form == "S":
            self.components = Vectors(max(place.rank for place in places), options.latent_size)

    @property
    def by_module(self) -> list[tuple[Head, list[Place]]]:
        """Each head and the places that it writes for."""
        heads = [head for head in self.heads if isinstance(head, Head)]
        return list(zip(heads, self.of_module.values(), strict=True))

    def forward(self, condition: Tensor) -> dict[str, Written]:
        latent_BPZ, written = self.trunk.first(condition), dict[str, Written]()
        for number, (head, own) in enumerate(self.by_module):
            latent_BMZ = latent_BPZ[:, self.trunk.of_module(own[0].module)]
            a_BMCI, b_BMOC = head(*self._rows(number, head.linear, own[0], latent_BMZ))
            for at, place in enumerate(own):
                written[place.name] = Written(a_BMCI[:, at], self.scale * b_BMOC[:, at])
        return {place.name: written[place.name] for place in self.places}

    def penalty(self, written: dict[str, Written]) -> Tensor | None:
        """Mean squares of A and B, a mean over the places of each module; the offset is in them, the scale is not."""
        if not self.regular:
            return None
        found = [
            torch.stack([written[p.name].a.square().mean() for p in own]).mean()
            + torch.stack([(written[p.name].b / self.scale).square().mean() for p in own]).mean()
            for _, own in self.by_module
        ]
        weight: float = self.options.written_penalty
        return weight * torch.stack(found).sum()

    def make_room(self, names: Collection[str]) -> None:
        if any(name.endswith(SPREAD) for name in names):
            for head, _ in self.by_module:
                head.make_room()

    def stand_on(self, adapters: Sequence[Mapping[str, Factors]]) -> None:
        """Write z-scores of these adapters' factors from now on: an untrained network writes their mean.

        Args:
            adapters: at least two; the factors of every place, in one gauge, with the scale in them.
        """
        for head, own in self.by_module:
            a_EMCI, b_EMOC = (
                torch.stack([torch.stack([adapter[place.name][side] for place in own]) for adapter in adapters])
                for side in (0, 1)
            )
            head.stand_on(a_EMCI, b_EMOC / self.scale)
        self.regular = False

    def spreads(self) -> dict[str, Factors]:
        """The spread of every number over the adapters of `stand_on`, by place, with the scale in it."""
        found = {}
        for head, own in self.by_module:
            assert head.spread_a_MCI is not None
            assert head.spread_b_MOC is not None
            for at, place in enumerate(own):
                found[place.name] = head.spread_a_MCI[at], self.scale * head.spread_b_MOC[at]
        return found

    def _outputs(self, place: Place) -> int:
        """Numbers that a head writes at once."""
        one, d_in, d_out = place.rank, place.d_in, place.d_out
        return {"L": one * (d_in + d_out), "M": one * max(d_in, d_out), "S": max(d_in, d_out)}[self.form]

    def _rows(self, number: int, linear: nn.Linear, place: Place, latent_BMZ: Tensor) -> Factors:
        """What head `number` writes for places such as this: rows of A [B, M, C, I], rows of B [B, M, C, O]."""
        trunk, sizes, shape = self.trunk, (place.d_in, place.d_out), (*latent_BMZ.shape[:2], place.rank, -1)
        if self.form == "L":
            a, b = linear(trunk.second(latent_BMZ)).split([place.rank * size for size in sizes], -1)
            return a.reshape(shape), b.reshape(shape)
        rows = []
        for side_Z, size in zip(self.sides(slice(2 * number, 2 * number + 2)), sizes, strict=True):
            told = trunk.block2(latent_BMZ + side_Z)
            if self.form == "S":  # all components together; each could be written alone
                told = told.unsqueeze(2) + trunk.block2(self.components(slice(place.rank)))
            rows.append(linear(trunk.out(told)).reshape(shape)[..., :size])
        return rows[0], rows[1]
