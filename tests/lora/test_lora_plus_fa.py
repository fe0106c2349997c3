"""LoRA+, where B learns faster than A, and LoRA-FA, where A does not learn at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from numeric import assert_close_to_truth
from safetensors.torch import load_file
from tiny_run import assembled, make_recipe, train
from torch import nn

from dynlora_cli.errors import RecipeError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.svd_basis import to_svd_basis
from dynlora_cli.training.step import step

from toy import fill, make


def one_step(tmp_path, *overrides):
    """The change of all A and of all B in the first step that has a rate, and the run."""
    run = assembled(make_recipe(tmp_path, *overrides))
    before = [half.clone() for half in run.trained.halves()]
    step(run, run.batches.step(0, 0))
    return *(half - old for half, old in zip(run.trained.halves(), before, strict=True)), run


@pytest.mark.parametrize(
    "overrides", [(), ("train.weight_decay=0.1",), ("train.optimizer=adamw_8bit",), ("adapter.variant=lora", "seed=3")]
)
def test_b_goes_ratio_times_as_far_and_a_as_far_as_before(overrides, tmp_path):
    a, b, _ = one_step(tmp_path, *overrides)
    a_plus, b_plus, _ = one_step(tmp_path, *overrides, "train.lora_plus_ratio=16")
    assert torch.equal(a_plus, a)
    assert b.abs().max() > 1e-3
    # Changes of weights up to 0.2 are known to these weights' last bits, 40 times those of changes up to 0.005.
    assert_close_to_truth(b_plus, 16 * b.double(), terms=64)


def test_the_ratio_is_that_of_two_parameter_groups(tmp_path):
    """Over several steps, against AdamW with a rate for each."""
    recipe = make_recipe(tmp_path, "train.lora_plus_ratio=4", "train.weight_decay=0.1", "rank.init=2")
    run = assembled(recipe)
    a, b = (nn.Parameter(half.clone()) for half in run.trained.halves())
    groups = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], weight_decay=0.1)
    inner = run.optimizer.step

    def both():
        gradients = run.trained.values.grad.split([a.numel(), b.numel()])
        a.grad, b.grad = (gradient.clone() for gradient in gradients)
        rate = run.optimizer.param_groups[0]["lr"]
        groups.param_groups[0]["lr"], groups.param_groups[1]["lr"] = rate, 4 * rate
        groups.step()
        inner()

    run.optimizer.step = both
    for index in range(4):
        step(run, run.batches.step(0, index))
        run.progress.step += 1
    for half, expected in zip(run.trained.halves(), (a, b), strict=True):
        assert_close_to_truth(half, expected.detach().double(), terms=4 * 8)  # four steps of the same arithmetic


@pytest.mark.slow
def test_a_run_with_the_ratio_resumes_and_learns_more_in_few_steps(tmp_path):
    plain, _ = train(make_recipe(tmp_path, "train.learning_rate=1e-3", out="plain"))
    recipe = make_recipe(tmp_path, "train.learning_rate=1e-3", "train.lora_plus_ratio=8", "train.save_steps=5")
    summary, _ = train(recipe)
    assert summary["loss_after"] < plain["loss_after"] - 0.01
    assert_resumes(recipe)


def test_variants_without_an_a_or_b_of_their_own_are_refused(tmp_path):
    for variant, setting in (("sora", "adapter.freeze_a=true"), ("singlora", "train.lora_plus_ratio=16")):
        with pytest.raises(RecipeError, match=rf"{setting.partition('=')[0]}: .*{variant}"):
            make_recipe(tmp_path, f"adapter.variant={variant}", setting)
    make_recipe(tmp_path, "adapter.variant=dora", "adapter.freeze_a=true", "train.lora_plus_ratio=16")


def assert_resumes(recipe):
    out = Path(recipe.output_dir)
    first = (out / "adapter_model.safetensors").read_bytes()
    train(recipe, resume_from=out / "checkpoints" / "step-5", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == first


# -- LoRA-FA ---------------------------------------------------------------------------------------------------------


def layer_and_pool(d_in=64, d_out=96, count=4, dtype=torch.float32):
    torch.manual_seed(0)
    layer = ComponentLinear(nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False), 1.7)
    pool = Pool({"layer": layer}, {"layer": count}, seed=3)
    pool.adopt(pool.values.detach().to(dtype), pool.counts)
    with torch.no_grad():
        pool.values.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return layer, pool


def gradients(layer, pool, x):
    x = x.clone().requires_grad_(True)
    pool.values.grad.zero_()
    layer(x).square().sum().backward()
    return x.grad, layer.a_CI.grad.clone(), layer.b_OC.grad.clone()


@pytest.mark.parametrize("fuse", [True, False])
def test_a_frozen_a_has_no_gradient_and_the_others_are_as_before(fuse, monkeypatch):
    monkeypatch.setattr(ComponentLinear, "fuse", fuse)
    layer, pool = layer_and_pool(dtype=torch.float64)
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    expected_x, a, expected_b = gradients(layer, pool, x)
    scores_K = pool.gate_gradient_K()
    pool.freeze_a()
    found_x, a_frozen, found_b = gradients(layer, pool, x)
    assert a.any()
    assert not a_frozen.any()
    assert torch.equal(found_x, expected_x)
    assert torch.equal(found_b, expected_b)
    torch.testing.assert_close(pool.gate_gradient_K(), scores_K)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fuse", [True, False])
def test_the_layers_input_is_not_kept(fuse, autocast, monkeypatch):
    monkeypatch.setattr(ComponentLinear, "fuse", fuse)
    layer, pool = layer_and_pool()
    kept = {}
    for frozen in (False, True):
        if frozen:
            pool.freeze_a()
        saved, x = [], torch.randn(50, 64, requires_grad=True)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)
        with keep, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x)
        kept[frozen] = [t for t in saved if tuple(t.shape) == (50, 64)]
        assert any(t.numel() == 50 * 4 for t in saved), "the C-wide product"
    assert kept[False]
    assert not kept[True]


def test_pruning_and_the_gauge_leave_a_frozen():
    net, pool = make(dtype=torch.float64)
    fill(pool)
    pool.freeze_a()
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
    x = torch.randn(6, 12, dtype=torch.float64)
    net(x).square().mean().backward()
    optimizer.step()
    before = net(x).detach()
    to_svd_basis(pool, optimizer)
    torch.testing.assert_close(net(x).detach(), before)
    shrink(pool, optimizer, torch.tensor([True, False, True] * 3))
    assert not any(layer.a_CI.requires_grad for layer in pool.layers.values())
    pool.values.grad.zero_()
    net(x).square().mean().backward()
    assert not any(layer.a_CI.grad.any() for layer in pool.layers.values())
    assert all(layer.b_OC.grad.any() for layer in pool.layers.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_neither_momentum_nor_weight_decay_move_a(optimizer, tmp_path):
    overrides = "adapter.freeze_a=true", "train.weight_decay=0.5", f"train.optimizer={optimizer}"
    a, b, run = one_step(tmp_path, *overrides)
    assert not a.any()
    assert b.any()
    free, _, _ = one_step(tmp_path, *overrides, "adapter.freeze_a=false")
    assert free.any()
    state = run.optimizer.state[run.trained.values]
    assert state.get("exp_avg", state.get("state1")).numel() == run.trained.parameters, "they exist, as zeros"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_whole_run_trains_prunes_and_resumes(variant, tmp_path):
    """Without the gauge every A that is left is one that was there at the start."""
    overrides = f"adapter.variant={variant}", "adapter.freeze_a=true", "train.weight_decay=0.1", "train.save_steps=1"
    recipe = make_recipe(tmp_path, *overrides, "pruning.gauge=false")
    summary, _ = train(recipe)
    assert summary["loss_after"] < summary["loss_before"] - 0.01
    assert summary["parameters"] <= summary["budget_parameters"]
    out = Path(recipe.output_dir)
    start = load_file(out / "checkpoints" / "step-1" / "adapter_model.safetensors")
    end = load_file(out / "adapter_model.safetensors")
    names = [name for name in end if "lora_A" in name]
    assert names
    for name in names:
        rows = {tuple(row) for row in start[name].tolist()}
        assert all(tuple(row) in rows for row in end[name].tolist())
    assert_resumes(recipe)


@pytest.mark.slow
def test_healing_leaves_a_as_it_is(tmp_path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path, "adapter.freeze_a=true", "train.weight_decay=0.1")
    train(recipe)
    common = "prune", "--adapter", recipe.output_dir, "--budget", "0.5", "--json", "--out"
    assert dynlora(*common, tmp_path / "cut").code == 0
    assert dynlora(*common, tmp_path / "healed", "--heal", "3").code == 0
    cut, healed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "healed"))
    assert cut.keys() == healed.keys()
    for name, value in cut.items():
        assert torch.equal(value, healed[name]) == ("lora_A" in name), name
