"""Adapters as what a hypernetwork is to write: their factors in one gauge, and how far what it writes is from them.

The same update has many factors: (B T⁻¹)(T A) for every invertible T, so what training ended in says nothing number by
number, least of all where runs began with different A. All are put in their SVD basis at scale 1 (lora/svd_basis.py),
where a component's sign alone is free: it is the one that agrees with the adapters before. What is compared are
z-scores, each number's over the adapters: otherwise the few large ones were all that counts.

Measured on eight adapters of eight seeds (2.63 nats on their rows), with heads L and S and 300 steps for each network:
as the factors are, the mean of the adapters has 5.7 nats and what was written 4.0; in the SVD basis with the largest
number of a row positive 5.8 and 4.6; with signs that agree 4.7 and 3.9.

Source: Charakorn et al. 2025, Text-to-LoRA (arXiv 2506.06105), the reconstruction loss; there the factors are compared
as they are, as all its adapters began with the same A.

Dimensions: E adapters, B conditions, C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.svd_basis import one_gauge
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.hypernets.hypernet import Place, Written

Pair = tuple[Tensor, Tensor]  # a_CI and b_OC, the scale in them
SMALLEST = 1e-10  # added to a spread before it divides: a number that no adapter has is 0 in all of them


def targets_of(
    members: Mapping[str, Adapter], places: Sequence[Place], key: str
) -> tuple[list[dict[str, Pair]], list[str]]:
    """The factors of every place of each adapter, zeros where it has none; and notes on what was padded or cut.

    Args:
        members: the adapters by name.
        places: the layers that are written for.
        key: of the recipe, for messages.

    Raises:
        UsageError: an adapter is more than a plain LoRA, or has layers that are not written for.
    """
    found = []
    for name, adapter in members.items():
        _refuse_unlike(name, adapter, places, key)
        targets = {}
        for place in places:
            layer = adapter.layers.get(place.name)
            none = torch.zeros(place.rank, place.d_in), torch.zeros(place.d_out, place.rank)
            targets[place.name] = none if layer is None else one_gauge(layer.a_CI, layer.b_OC, place.rank)
        found.append(targets)
    _agree(found)
    return found, _notes(members, places, found)


def _agree(targets: Sequence[dict[str, Pair]]) -> None:
    """Turn signs of components so that each points along the sum of those of the adapters before, in place."""
    for name in targets[0]:
        sum_a, sum_b = (torch.zeros_like(part) for part in targets[0][name])
        for target in targets:
            a, b = target[name]
            sign_C = torch.where((sum_a * a).sum(1) + (sum_b * b).sum(0) < 0, -1.0, 1.0).to(a)
            target[name] = a, b = sign_C[:, None] * a, b * sign_C
            sum_a, sum_b = sum_a + a, sum_b + b


class Distance:
    """How far what is written is from the adapters: the mean absolute difference of their z-scores, A's and B's alike.

    Args:
        targets: of each adapter, as `targets_of` makes them.
        spreads: what a z-score of 1 is, for every number.
        places: the layers that are written for.

    What is written is to be on the device of the spreads.
    """

    def __init__(
        self, targets: Sequence[Mapping[str, Pair]], spreads: Mapping[str, Pair], places: Sequence[Place]
    ) -> None:
        self.places, self.spreads = places, {name: (a + SMALLEST, b + SMALLEST) for name, (a, b) in spreads.items()}
        self.targets = {
            place.name: tuple(
                torch.stack([one[place.name][side] for one in targets]).to(spreads[place.name][side]) for side in (0, 1)
            )
            for place in places
        }

    def __call__(self, written: Mapping[str, Written], adapters_B: Tensor) -> Tensor:
        """Mean over conditions and modules, of the mean over a module's numbers: a scalar in fp32.

        Args:
            written: of B conditions.
            adapters_B: the number of the adapter that each of them is to give.
        """
        by_module: dict[str, list[Tensor]] = {}
        for place in self.places:
            own = written[place.name]
            for made, wanted_E, spread in zip(own[:2], self.targets[place.name], self.spreads[place.name], strict=True):
                z = (made - wanted_E[adapters_B]) / spread
                by_module.setdefault(place.module, []).append(z.abs().mean())
        return torch.stack([torch.stack(parts).mean() for parts in by_module.values()]).mean()


def _refuse_unlike(name: str, adapter: Adapter, places: Sequence[Place], key: str) -> None:
    """Refuse an adapter that factors at these places cannot be.

    Raises:
        UsageError: it is one.
    """
    if adapter.form != PLAIN or not adapter.layers or any(factors.embedding for factors in adapter.layers.values()):
        raise UsageError(
            f"{key}: {name} is {adapter.kind}, and plain LoRAs of linear layers are written", "leave it out"
        )
    if own := adapter.own_numbers():
        raise UsageError(f"{key}: {name} cannot be written: {own}", "leave it out")
    shapes = {place.name: (place.d_in, place.d_out) for place in places}
    for layer, factors in adapter.layers.items():
        if shapes.get(layer) != (factors.a_CI.shape[1], factors.b_OC.shape[0]):
            text = f"{key}: {name} changes {layer}, which the network does not write for"
            raise UsageError(text, "write `adapter.target_modules` so that it takes in the layers of all adapters")


def _notes(members: Mapping[str, Adapter], places: Sequence[Place], targets: Sequence[Mapping[str, Pair]]) -> list[str]:
    counts = {place.name: place.rank for place in places}
    ranks = [(layer, rank) for adapter in members.values() for layer, rank in adapter.ranks.items()]
    notes = []
    if padded := sum(rank < counts[layer] for layer, rank in ranks):
        notes.append(
            f"{counted(padded, 'layer')} of the adapters have fewer components than are written; theirs are followed "
            "by zeros"
        )
    if any(rank > counts[layer] for layer, rank in ranks):
        kept = [
            sum(float((b.norm(dim=0) * a.norm(dim=1)).square().sum()) for a, b in target.values())
            / (sum(factors.energy() ** 2 for factors in adapter.layers.values()) or 1.0)
            for target, adapter in zip(targets, members.values(), strict=True)
        ]
        notes.append(
            f"layers with more components than are written keep their largest, {min(kept):.0%} of the squared size of "
            "the adapter that loses most; a larger rank.budget keeps more"
        )
    return notes
