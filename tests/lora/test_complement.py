"""InfLoRA's start on small matrices: the span of earlier inputs, and directions outside it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import assembled, make_recipe

from dynlora_cli.lora.complement import ENERGY, MOST, complement_start, span_of, widest, without
from dynlora_cli.lora.directions import Directions
from dynlora_cli.pruning.calibration import watch_inputs

WIDTH = 24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, directions, seed=0, shift=0.0):
    """Vectors in the span of the first `directions` unit vectors of a fixed basis, around a mean."""
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=seeded(9))).Q.T
    return (torch.randn(count, directions, generator=seeded(seed)) + shift) @ basis[:directions]


def watched(x_NI, count=12):
    found = Directions(count, centered=False)
    for part in x_NI.split(16):
        found.add(part)
    return found


def test_directions_around_zero_are_those_of_the_second_moment():
    x = inputs(100, WIDTH, shift=2.0)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    found = watched(x, WIDTH)
    assert found.total == pytest.approx(x.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(found.scaled_CI.norm(dim=1), s, rtol=1e-3, atol=1e-4)
    assert abs(torch.dot(found.scaled_CI[0] / s[0], v[0]).item()) == pytest.approx(1.0, abs=1e-5)


def test_the_span_holds_the_energy_with_as_few_directions_as_can_be():
    x = inputs(200, 10) * torch.linspace(3, 0.1, WIDTH)
    span, held = span_of(watched(x), 12)
    torch.testing.assert_close(span @ span.T, torch.eye(len(span)), atol=1e-5, rtol=0)
    left = without(x, span).square().sum() / x.square().sum()
    assert held == pytest.approx(1 - left.item(), abs=1e-4)
    assert held >= ENERGY
    fewer = without(x, span[:-1]).square().sum() / x.square().sum()
    assert fewer > 1 - ENERGY


def test_a_bounded_span_says_what_it_holds():
    x = inputs(200, WIDTH)
    span, held = span_of(watched(x), 3)
    assert len(span) == 3
    assert held == pytest.approx(1 - (without(x, span).square().sum() / x.square().sum()).item(), abs=1e-2)
    assert held < ENERGY


def test_the_span_leaves_room_for_new_components():
    assert widest(24, 4) == 12
    assert widest(24, 20) == 4
    assert widest(4096, 16) == MOST
    assert widest(2, 1) == 1


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_new_components_are_silent_on_earlier_inputs_and_hear_the_new(shift):
    earlier, now = inputs(200, 6, shift=shift), inputs(200, 14, seed=1)
    span, held = span_of(watched(earlier), 12)
    outside = Directions(8, centered=False)
    outside.add(without(now, span))
    a_CI = complement_start(outside, span, 4, seeded())
    torch.testing.assert_close(a_CI @ a_CI.T, torch.eye(4) / 3, atol=1e-5, rtol=0)
    assert (a_CI @ span.T).abs().max() < 1e-5
    heard = (earlier @ a_CI.T).square().sum() / earlier.square().sum()
    assert heard <= (1 - held) / 3 + 1e-6
    assert (now @ a_CI.T).square().sum() / now.square().sum() > 0.05
    best = torch.linalg.svdvals(without(now, span))[:4].square().sum()
    assert (now @ a_CI.T).square().sum() * 3 == pytest.approx(best.item(), rel=1e-3)


def test_missing_directions_are_drawn_outside_the_span():
    earlier = inputs(100, 8)
    span, _ = span_of(watched(earlier), 12)
    nothing = Directions(8, centered=False)
    nothing.add(without(earlier, span))
    a_CI = complement_start(nothing, span, 5, seeded())
    torch.testing.assert_close(a_CI @ a_CI.T, torch.eye(5) / 3, atol=1e-5, rtol=0)
    assert (a_CI @ span.T).abs().max() < 1e-5


def test_every_token_but_padding_is_watched(tmp_path):
    run = assembled(make_recipe(tmp_path, "adapter.target_modules=[q_proj]"), fill=False)
    batches = [run.batches.step(0, index)[0] for index in range(2)]
    counts = dict.fromkeys(run.trained.layers, 4)
    found = watch_inputs(run.model, batches, run.trained.layers, counts, around_zero=True)
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
    assert {directions.vectors for directions in found.values()} == {tokens}
    halved = watch_inputs(
        run.model, batches, run.trained.layers, counts, around_zero=True, change=lambda name, x_NI: x_NI / 2
    )
    for name, directions in halved.items():
        assert math.isclose(directions.total, found[name].total / 4, rel_tol=1e-5)
    more = watch_inputs(run.model, batches, run.trained.layers, counts, around_zero=True, found=found)
    assert {directions.vectors for directions in more.values()} == {2 * tokens}
