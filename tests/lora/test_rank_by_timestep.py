"""T-LoRA: how many components a row uses, and layers that heed it, against the formulas in fp64."""

from __future__ import annotations

import json

import pytest
import torch
from numeric import assert_close_to_truth
from timed_denoiser import T, by_hand, fill, options, rank_by_hand, timed
from torch import nn

from dynlora_cli import plugins
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.timesteps.clock import for_rows
from dynlora_cli.lora.timesteps.orthogonal import smallest_values
from dynlora_cli.lora.timesteps.schedule import KEY, Schedule, from_metadata, read

# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("least", [0, 1, 5, 40])
def test_the_rank_is_that_of_the_formula(power, least):
    plan = Schedule(power=power, min_rank=least)
    every = torch.arange(1000)
    for most in (1, 2, 7, 32):
        found = plan.ranks_B(plan.shares_B(every), most).tolist()
        assert found == [rank_by_hand(t, most, min(least, most), power) for t in range(1000)]


def test_whole_timesteps_give_the_exact_floor():
    plan = Schedule()
    for most in range(1, 65):
        found = plan.ranks_B(plan.shares_B(torch.arange(1001)), most).tolist()
        assert found == [(1000 - t) * (most - 1) // 1000 + 1 for t in range(1001)]


def test_the_reverse_and_a_drawn_rank_have_the_same_mean():
    every = torch.arange(1000)
    means = {}
    for shape in ("falling", "rising", "random"):
        plan = Schedule(shape=shape, seed=1)
        ranks = plan.ranks_B(plan.shares_B(every, step=4), 16).double()
        means[shape] = ranks.mean().item()
        if shape == "rising":
            assert ranks.diff().min() >= 0
    assert means["rising"] == pytest.approx(means["falling"], abs=0.03)
    assert means["random"] == pytest.approx(means["falling"], abs=0.5)  # four standard errors of 1000 draws


def test_drawn_ranks_are_those_of_seed_step_row_and_timestep_alone():
    plan = Schedule(shape="random", seed=1)
    one = plan.shares_B(T, step=4)
    assert torch.equal(one, plan.shares_B(T, step=4))
    assert not torch.equal(one, plan.shares_B(T, step=5))
    assert not torch.equal(one, Schedule(shape="random", seed=2).shares_B(T, step=4))
    assert len(set(plan.shares_B(torch.zeros(8), step=4).tolist())) == 8, "each row has a draw of its own"


def test_products_of_one_component_are_used_together():
    plan = Schedule(terms=2)
    assert [plan.rank_at(t, 8) for t in (0, 500, 999)] == [8, 4, 2]


def test_a_schedule_comes_back_from_a_file():
    plan = Schedule(timesteps=1.0, power=2.0, min_rank=3, shape="rising", terms=2, seed=9)
    assert from_metadata({"format": "pt", **plan.as_metadata()}, "here") == plan
    assert from_metadata({"format": "pt"}, "here") is None
    assert from_metadata(None, "here") is None


@pytest.mark.parametrize(
    "change",
    [
        {"power": 0}, {"power": float("nan")}, {"timesteps": -1}, {"shape": "else"}, {"terms": 3}, {"min_rank": -1},
        {"min_rank": True}, {"min_rank": 1.5}, {"more": 1}, {"seed": "x"},
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_carried_out_is_refused(change):
    with pytest.raises(UsageError, match="here: its rank by timestep"):
        read({**Schedule().as_dict(), **change}, "here")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 20000, json.dumps({"timesteps": 1})])
def test_a_damaged_text_is_refused(text):
    with pytest.raises(UsageError, match="rank by timestep"):
        from_metadata({KEY: text}, "here")


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_each_row_has_the_rank_of_its_own_timestep(start):
    model, pool = timed(start=start)
    fill(pool)
    x = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = model(x, T)
    torch.testing.assert_close(found, by_hand(model, pool, x, T))
    assert not torch.allclose(found, model(x, torch.zeros(5))), "the masks do something"
    one_for_all = model(x, timestep=torch.tensor(500))
    torch.testing.assert_close(one_for_all, by_hand(model, pool, x, torch.full((5,), 500)))


def test_tokens_of_a_row_have_its_rank_in_any_arrangement():
    model, pool = timed()
    fill(pool)
    x = torch.randn(5, 3, 10, dtype=torch.float64)
    by_row = model(x, T)
    torch.testing.assert_close(model(x.flatten(0, 1), T), by_row.flatten(0, 1))
    torch.testing.assert_close(model(x[:, :, None], T), by_row[:, :, None])
    with pytest.raises(UsageError, match="which is whose"):
        for_rows(torch.ones(2, 4), torch.ones(5, 4))


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_it_starts_as_the_base(start):
    model, pool = timed(start=start, dtype=torch.float32)
    x = torch.randn(5, 10)
    truth = model.double().second.base(torch.tanh(model.first.base(x.double())))
    assert_close_to_truth(model.float()(x, T), truth, terms=40)
    assert pool.magnitudes_K().max() == 0


def test_the_orthogonal_start_is_what_it_says():
    _, pool = timed(start="orthogonal", dtype=torch.float32)
    layer = pool.layers["first"]
    a, b = layer.factors()
    assert_close_to_truth((a[::2] @ a[::2].T), torch.eye(4).double(), terms=40)
    torch.testing.assert_close(a[::2], a[1::2])
    torch.testing.assert_close(b[:, ::2], -b[:, 1::2])
    lengths = b[:, ::2].norm(dim=0)
    torch.testing.assert_close(lengths, smallest_values(12, 10, 4))
    assert lengths.diff().max() < 0, "largest first"
    matrix = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) / 4
    assert lengths[0] < torch.linalg.svdvals(matrix)[0] / 2, "the smallest ones, not the largest"


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_gradients_are_those_of_the_formula_and_the_start_does_not_train(start):
    model, pool = timed(start=start)
    fill(pool)
    x = torch.randn(5, 10, dtype=torch.float64)
    model(x, T).square().sum().backward()
    found = pool.values.grad.clone()
    pool.values.grad.zero_()
    by_hand(model, pool, x, T).square().sum().backward()
    torch.testing.assert_close(found, pool.values.grad)
    pool.settle_gradient()
    layer = pool.layers["first"]
    if start == "orthogonal":
        assert layer.a_CI.grad[:, layer.in_features + 1 :].abs().max() == 0
        assert layer.b_OC.grad[layer.out_features :].abs().max() == 0
    assert layer.a_CI.grad[:, : layer.in_features].abs().max() > 0


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_gate_gradients_are_derivatives(start):
    model, pool = timed(start=start)
    fill(pool)
    x = torch.randn(5, 10, dtype=torch.float64)
    model(x, T).square().sum().backward()
    pool.settle_gradient()
    found = pool.gate_gradient_K()
    wanted, step = [], 1e-6
    for layer in pool.layers.values():
        for i in range(layer.count):
            sides = []
            for sign in (1, -1):
                layer.gate = torch.ones(layer.count, dtype=torch.float64)
                layer.gate[i] += sign * step
                sides.append(model(x, T).square().sum().item())
            layer.gate = None
            wanted.append((sides[0] - sides[1]) / (2 * step))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["vanilla", "orthogonal"])
def test_it_is_pruned_from_the_end_and_the_rule_goes_by_what_is_left(start):
    model, pool = timed(start=start)
    fill(pool)
    scores = pool.ranked(torch.tensor([1.0, 3.0, 0.5, 2.0, 5.0, 1.0, 4.0]))
    assert scores.tolist() == [3.0, 3.0, 2.0, 2.0, 5.0, 4.0, 4.0]
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
    x = torch.randn(5, 10, dtype=torch.float64)
    model(x, T).square().sum().backward()
    optimizer.step()
    pool.after_update(0.01)
    shrink(pool, optimizer, torch.tensor([True, True, False, False, True, True, False]))
    torch.testing.assert_close(model(x, T), by_hand(model, pool, x, T))


def test_magnitudes_are_of_what_a_component_adds():
    _, pool = timed(start="orthogonal")
    fill(pool)
    layer = pool.layers["first"]
    a, b = layer.factors()
    wanted = [(b[:, 2 * i : 2 * i + 2] @ a[2 * i : 2 * i + 2]).norm() * layer.scale for i in range(4)]
    torch.testing.assert_close(layer.magnitudes_C(), torch.stack(wanted), rtol=1e-6, atol=1e-9)


def test_a_model_that_is_told_no_timestep_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="is told no timestep"):
        plugins.load("variants", "t-lora").attach(model, {"0": model[0]}, Start({"0": 2}, 1, 1, 2.0), options(), 3)
