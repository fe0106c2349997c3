"""Adapters as what a hypernetwork is to write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors, TokenRows
from dynlora_cli.errors import UsageError
from dynlora_cli.hypernets.hypernet import Written, places_of
from dynlora_cli.hypernets.targets import Distance, targets_of

RANK = 3
SHAPES = {"q": (6, 5), "down": (8, 6)}
LAYERS = [(f"h.{n}.{module}", *shape, RANK) for n in range(2) for module, shape in SHAPES.items()]
PLACES = places_of(LAYERS)


def adapter_of(seed: int, ranks: tuple[int, ...] = (3, 3, 3, 3), **changed: Any) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    layers = {
        name: Factors(torch.randn(rank, d_in, generator=chance), torch.randn(d_out, rank, generator=chance), scale=2.0)
        for (name, d_in, d_out, _), rank in zip(LAYERS, ranks, strict=True)
        if rank
    }
    return replace(Adapter(Path("a"), layers, {}), **changed)


def members(*adapters: Adapter) -> dict[str, Adapter]:
    return {f"a{number}": adapter for number, adapter in enumerate(adapters)}


def stacked(targets: list[dict[str, tuple[Tensor, Tensor]]], name: str, side: int) -> Tensor:
    return torch.stack([target[name][side] for target in targets])


def test_the_update_is_kept_at_scale_1_and_places_without_a_layer_are_zeros():
    adapter = adapter_of(0, (3, 1, 0, 2))
    (target, _), notes = targets_of(members(adapter, adapter_of(1)), PLACES, "adapter.library")
    for place in PLACES:
        a, b = target[place.name]
        assert (a.shape, b.shape) == ((RANK, place.d_in), (place.d_out, RANK))
        layer = adapter.layers.get(place.name)
        wanted = torch.zeros(place.d_out, place.d_in) if layer is None else layer.delta_OI()
        torch.testing.assert_close(b @ a, wanted)
    assert notes == ["2 layers of the adapters have fewer components than are written; theirs are followed by zeros"]


def test_adapters_that_differ_by_their_gauge_alone_are_one_target():
    adapter = adapter_of(0)
    T = torch.randn(3, 3, generator=torch.Generator().manual_seed(9))
    layers = {
        name: replace(f, a_CI=T @ f.a_CI, b_OC=f.b_OC @ torch.linalg.inv(T)) for name, f in adapter.layers.items()
    }
    (one, other), notes = targets_of(members(adapter, adapter.with_layers(layers)), PLACES, "adapter.library")
    assert not notes
    for name in one:
        for mine, theirs in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_signs_of_components_agree_with_the_adapters_before():
    near = adapter_of(0)
    chance = torch.Generator().manual_seed(3)
    layers = {
        name: replace(f, a_CI=-f.a_CI - 0.1 * torch.randn(f.a_CI.shape, generator=chance), b_OC=-f.b_OC)
        for name, f in near.layers.items()
    }
    targets, _ = targets_of(
        members(near, near.with_layers(layers), *(adapter_of(seed) for seed in range(1, 6))), PLACES, "adapter.library"
    )
    for name, *_ in LAYERS:
        a, b = (stacked(targets, name, side) for side in (0, 1))
        for number in range(1, len(targets)):
            along = (a[:number].sum(0) * a[number]).sum(1) + (b[:number].sum(0) * b[number]).sum(0)
            assert (along >= 0).all()
        assert (a[0] - a[1]).norm() < a[0].norm()


def test_a_larger_rank_is_cut_and_that_is_said():
    adapter = adapter_of(0, (5, 3, 3, 3))
    (target, _), (note,) = targets_of(members(adapter, adapter_of(1)), PLACES, "adapter.library")
    name = LAYERS[0][0]
    a, b = target[name]
    wanted = torch.linalg.svdvals(adapter.layers[name].delta_OI())[:RANK]
    torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:RANK], wanted)
    whole = sum(f.energy() ** 2 for f in adapter.layers.values())
    share = 1 - (adapter.layers[name].energy() ** 2 - wanted.square().sum().item()) / whole
    assert f"{share:.0%} of the squared size" in note


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_rows": {"wte": TokenRows((1,), torch.zeros(1, 6))}}, "its own rows of wte"),
        ({"whole": {"score.weight": torch.zeros(2, 6)}}, "its own score"),
        ({"layers": {"h.0.up": Factors(torch.zeros(1, 6), torch.zeros(8, 1))}}, "changes h.0.up, which the network"),
        ({"layers": {"h.0.q": Factors(torch.zeros(1, 6), torch.zeros(9, 1))}}, "changes h.0.q, which the network"),
        ({"layers": {}}, "plain LoRAs of linear layers are written"),
        (
            {
                "layers": {
                    "h.0.q": Factors(
                        torch.zeros(1, 6), torch.zeros(5, 1), kind="dora", own={"magnitude_O": torch.ones(5)}
                    )
                }
            },
            "a1 is DoRA",
        ),
    ],
)
def test_what_factors_at_these_places_cannot_be_is_refused(changed: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=f"adapter.library: a1.*{words}|adapter.library: {words}"):
        targets_of(members(adapter_of(0), adapter_of(1, **changed)), PLACES, "adapter.library")


def test_the_distance_is_the_mean_of_absolute_z_scores_over_modules():
    targets, _ = targets_of(members(*(adapter_of(seed) for seed in range(4))), PLACES, "adapter.library")
    spreads = {place.name: tuple(stacked(targets, place.name, side).std(0) for side in (0, 1)) for place in PLACES}
    distance = Distance(targets, spreads, PLACES)  # type: ignore[arg-type]
    written = {p.name: Written(torch.randn(2, RANK, p.d_in), torch.randn(2, p.d_out, RANK)) for p in PLACES}
    means = []
    for module in SHAPES:
        parts = [
            ((written[name][side] - stacked(targets, name, side)[[3, 1]]) / spreads[name][side]).abs().mean()
            for name, *_ in LAYERS
            if name.endswith(module)
            for side in (0, 1)
        ]
        means.append(sum(parts) / len(parts))
    torch.testing.assert_close(distance(written, torch.tensor([3, 1])), sum(means) / len(means))
    exact = {p.name: Written(*(stacked(targets, p.name, side)[[2, 0]] for side in (0, 1))) for p in PLACES}
    assert distance(exact, torch.tensor([2, 0])) == 0
    assert distance(exact, torch.tensor([0, 2])) > 0.1


def test_numbers_that_are_the_same_in_all_adapters_add_nothing_if_they_are_written_so():
    targets, _ = targets_of(members(adapter_of(0, (1, 1, 1, 1)), adapter_of(1, (1, 1, 1, 1))), PLACES, "x")
    spreads = {place.name: tuple(stacked(targets, place.name, side).std(0) for side in (0, 1)) for place in PLACES}
    mean = {p.name: Written(*(stacked(targets, p.name, side).mean(0)[None] for side in (0, 1))) for p in PLACES}
    found = Distance(targets, spreads, PLACES)(mean, torch.tensor([0]))  # type: ignore[arg-type]
    # Of two adapters each is 1/sqrt 2 from the mean in every number; a third of the numbers are there in both.
    torch.testing.assert_close(found, torch.tensor(2**-0.5 / 3))
