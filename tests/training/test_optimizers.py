"""8-bit AdamW of bitsandbytes under rank control: moments that are quantized are pruned, turned, saved and counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_recipe, train
from torch import nn

from dynlora_cli.errors import MachineError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.moments import forget_steps, read_moments, write_moments
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.svd_basis import to_svd_basis
from dynlora_cli.training.optimizers import check_optimizer, make_optimizer, restore_state, state_bytes

# Of a block's largest number: half the widest gap in the table of bytes.
QUANTIZATION = 0.0075
COUNT, D_IN, D_OUT = 16, 300, 260


def trained(name, steps=5, weight_decay=0.0):
    """A pool of 8,960 numbers, and its optimizer after some steps with random gradients."""
    pool = Pool({"layer": ComponentLinear(nn.Linear(D_IN, D_OUT).requires_grad_(False), 1.0)}, {"layer": COUNT})
    optimizer = make_optimizer(name, [{"params": [pool.values], "coupled": True}], weight_decay)
    optimizer.param_groups[0]["lr"] = 1e-2
    more_steps(pool, optimizer, steps)
    return pool, optimizer


def more_steps(pool, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        pool.values.grad.copy_(torch.randn(pool.parameters, generator=generator))
        optimizer.step()


def within_quantization(found, expected):
    assert (found - expected).abs().max() <= QUANTIZATION * expected.abs().max()
    assert (found - expected).norm() < 0.02 * expected.norm()


def held_bytes(optimizer):
    """Bytes of the moments, without the table that all share."""
    states = [(key, t) for state in optimizer.state.values() for key, t in state.items() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for key, t in states if key != "step" and not key.startswith("qmap"))


def test_adamws_moments_are_read_without_a_copy():
    pool, optimizer = trained("adamw")
    before = dict(optimizer.state[pool.values])
    moments = read_moments(optimizer, pool.values)
    write_moments(optimizer, pool.values, moments)
    assert all(optimizer.state[pool.values][key] is value for key, value in before.items())
    assert moments["exp_avg"] is before["exp_avg"]


def test_bytes_are_read_as_the_moments_that_they_stand_for():
    pool, optimizer = trained("adamw_8bit", steps=1)
    assert optimizer.state[pool.values]["state1"].dtype == torch.uint8
    gradient, moments = pool.values.grad, read_moments(optimizer, pool.values)
    within_quantization(moments["exp_avg"], 0.1 * gradient)
    within_quantization(moments["exp_avg_sq"], 0.001 * gradient.square())


def test_what_is_left_keeps_its_moments_through_the_surgery():
    pool, optimizer = trained("adamw_8bit")
    before = read_moments(optimizer, pool.values)
    keep = torch.arange(COUNT) % 2 == 0
    shrink(pool, optimizer, keep)
    state, after = optimizer.state[pool.values], read_moments(optimizer, pool.values)
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].numel() == pool.parameters == 8 * (D_IN + D_OUT)
    assert state["step"] == 5
    kept = {key: (value[: COUNT * D_IN], value[COUNT * D_IN :]) for key, value in before.items()}
    for key, (a, b) in kept.items():
        expected = [a.view(COUNT, D_IN)[keep].flatten(), b.view(D_OUT, COUNT)[:, keep].flatten()]
        within_quantization(after[key], torch.cat(expected))
    old_values = pool.values.detach().clone()
    more_steps(pool, optimizer, 1)
    moved = (pool.values - old_values).abs()
    assert 0 < moved.max() < 0.1, "at a rate of 0.01, and not as if the moments were those of other numbers"


def test_below_4096_numbers_moments_are_kept_as_bitsandbytes_keeps_them_in_fp32():
    pool, optimizer = trained("adamw_8bit")
    expected = read_moments(optimizer, pool.values)["exp_avg"][: 4 * D_IN]
    shrink(pool, optimizer, torch.arange(COUNT) < 4)
    assert optimizer.state[pool.values].keys() == {"step", "state1", "state2"}
    torch.testing.assert_close(optimizer.state[pool.values]["state1"][: 4 * D_IN], expected, rtol=0, atol=0)
    more_steps(pool, optimizer, 1)
    assert optimizer.state[pool.values]["step"] == 6


def test_the_gauge_turns_bytes_as_it_turns_fp32():
    (pool, optimizer), (plain, adamw) = trained("adamw_8bit"), trained("adamw")
    with torch.no_grad():
        plain.values.copy_(pool.values)
    moments = read_moments(optimizer, pool.values)
    write_moments(adamw, plain.values, {key: value.clone() for key, value in moments.items()})
    assert to_svd_basis(pool, optimizer) == to_svd_basis(plain, adamw) == 1
    assert torch.equal(pool.values, plain.values)
    turned = read_moments(adamw, plain.values)
    assert not torch.allclose(turned["exp_avg"], moments["exp_avg"], atol=0.01)
    for key, value in read_moments(optimizer, pool.values).items():
        for half, expected in zip(value.split(COUNT * D_IN), turned[key].split(COUNT * D_IN), strict=True):
            within_quantization(half, expected)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_forgotten_steps_leave_an_optimizer_like_a_new_one(name):
    pool, optimizer = trained(name)
    with torch.no_grad():
        pool.values.fill_(0.5)
    forget_steps(optimizer)
    other, fresh = trained(name, steps=0)
    with torch.no_grad():
        other.values.fill_(0.5)
    more_steps(pool, optimizer, 2)
    more_steps(other, fresh, 2)
    assert torch.equal(pool.values, other.values)


@pytest.mark.parametrize("count", [COUNT, 4])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_bytes_are_counted_before_there_are_any(name, count):
    pool, optimizer = trained(name, steps=0)
    shrink(pool, optimizer, torch.arange(COUNT) < count)
    more_steps(pool, optimizer, 1)
    assert held_bytes(optimizer) == state_bytes(name, pool.values)


def test_eight_bits_are_a_quarter():
    assert state_bytes("adamw_8bit", torch.empty(10**6)) == pytest.approx(
        state_bytes("adamw", torch.empty(10**6)) / 4, rel=0.02
    )
    assert state_bytes("paged_adamw", torch.empty(10**6)) == state_bytes("adamw", torch.empty(10**6))


def test_paged_memory_is_used_again():
    """bitsandbytes never frees it. Here it is plain memory with the marks of a paged one."""
    pool, optimizer = trained("adamw_8bit")
    for key in ("state1", "state2"):
        buffer = optimizer.state[pool.values][key]
        buffer.is_paged, buffer.page_deviceid = True, 0
    place, before = optimizer.state[pool.values]["state1"].data_ptr(), read_moments(optimizer, pool.values)
    shrink(pool, optimizer, torch.arange(COUNT) < 8)
    state = optimizer.state[pool.values]
    assert state["state1"].data_ptr() == place
    assert state["state1"].is_paged
    assert state["state2"].page_deviceid == 0
    assert state["state1"].numel() == pool.parameters
    within_quantization(read_moments(optimizer, pool.values)["exp_avg"][: 8 * D_IN], before["exp_avg"][: 8 * D_IN])


def test_a_saved_state_comes_back_bit_by_bit():
    pool, optimizer = trained("adamw_8bit")
    saved = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[pool.values].items()}
    other, fresh = trained("adamw_8bit", steps=0)
    other.values.data.copy_(pool.values)
    restore_state(fresh, other.values, saved)
    assert all(torch.equal(torch.as_tensor(fresh.state[other.values][key]), value) for key, value in saved.items())
    more_steps(pool, optimizer, 3)
    more_steps(other, fresh, 3)
    assert torch.equal(pool.values, other.values)


@pytest.mark.slow
def test_a_run_in_8_bits_prunes_saves_resumes_and_learns_as_much(tmp_path):
    """It starts with 8,192 numbers and ends with 2,048, so it also crosses bitsandbytes' limit."""
    plain, _ = train(make_recipe(tmp_path, "train.learning_rate=2e-2", out="plain"))
    recipe = make_recipe(tmp_path, "train.learning_rate=2e-2", "train.optimizer=adamw_8bit", "train.save_steps=5")
    summary, _ = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"]
    learnt = plain["loss_before"] - plain["loss_after"]
    assert learnt > 0.1
    assert summary["loss_before"] - summary["loss_after"] == pytest.approx(learnt, rel=0.2)
    assert summary["loss_after"] == pytest.approx(plain["loss_after"], rel=0.03)

    out = Path(recipe.output_dir)
    types = {step: load_file(out / "checkpoints" / f"step-{step}" / "state.safetensors") for step in (5, 10)}
    assert [types[step]["optimizer.0.state1"].dtype for step in (5, 10)] == [torch.uint8, torch.float32]
    adapter = (out / "adapter_model.safetensors").read_bytes()
    again, _ = train(recipe, resume_from=out / "checkpoints" / "step-5", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert again["loss_after"] == summary["loss_after"]


@pytest.mark.slow
def test_other_variants_and_full_fine_tuning_take_it_too(tmp_path):
    for variant in ("ard", "full"):  # numbers of no dimension, and matrices
        overrides = f"adapter.variant={variant}", "train.optimizer=adamw_8bit", "train.max_steps=5"
        recipe = make_recipe(tmp_path, *overrides, out=variant)
        summary, _ = train(recipe)
        assert summary["loss_after"] < summary["loss_before"]


@pytest.mark.slow
def test_the_rate_is_searched_for_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dynlora_cli.training.rate.race.SHARE", 1.0)
    summary, _ = train(make_recipe(tmp_path, "train.learning_rate=auto", "train.optimizer=adamw_8bit", "eval.steps=12"))
    assert summary["loss_after"] < summary["loss_before"]


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_needs_cuda_and_says_so_before_anything_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("dynlora_cli.commands.train.read_data", None)
    recipe = make_recipe(tmp_path, f"train.optimizer={name}")
    with pytest.raises(MachineError, match=f"train.optimizer: {name} needs CUDA") as caught:
        train(recipe)
    assert caught.value.exit_code == 3
    assert caught.value.hint.endswith(name.removeprefix("paged_"))
    assert not Path(recipe.output_dir).exists()


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer("adamw", torch.device("cpu"))
    with pytest.raises(MachineError, match="adamw_8bit needs bitsandbytes") as caught:
        check_optimizer("adamw_8bit", torch.device("cpu"))
    assert caught.value.hint == "pip install bitsandbytes"
