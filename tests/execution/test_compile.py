"""`train.compile`: the same losses, and code that outlives the pruning events; needs a C++ compiler, as torch.compile does."""

from __future__ import annotations

import shutil

import pytest
import torch
from numeric import assert_close_to_truth
from tiny_run import assembled, lines, make_recipe, train
from torch import nn

from dynlora_cli.errors import MachineError
from dynlora_cli.execution import blocks
from dynlora_cli.execution.modes import compile as compiling
from dynlora_cli.kernels.linear_cross_entropy import compiled_judge, loss_and_gradient
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.tasks.loss import summed_loss

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiling.COMPILERS[0])), reason="torch.compile needs a C++ compiler"
)


def test_blocks_are_what_the_outermost_lists_hold():
    inner = nn.ModuleList([nn.Linear(2, 2)])
    block = nn.Sequential(inner, ComponentLinear(nn.Linear(2, 2), 1.0))
    model = nn.Sequential(nn.Embedding(3, 2), nn.Sequential(nn.ModuleList([block, nn.ModuleList([block, block])])))
    assert list(blocks.blocks(model)) == [block, block, block]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILERS", (("no-such-compiler",), ("no-such-compiler",)))
    with pytest.raises(MachineError, match=r"one of no-such-compiler"):
        compiling.compile_blocks(nn.Linear(2, 2), None)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_losses_are_those_of_the_plain_run_and_events_need_no_new_code(dtype, tmp_path):
    torch._dynamo.reset()
    before, losses, graphs = compiling.graphs_made(), [], []
    settings = ["rank.budget=4", "eval.steps=12", "train.log_steps=1", f"model.dtype={dtype}"]
    for switch in ("false", "true"):
        out = f"out-{switch}"
        _, events = train(make_recipe(tmp_path, *settings, f"train.compile={switch}", out=out))
        losses.append([line["loss"] for line in lines(tmp_path / out / "metrics.jsonl") if "loss" in line])
        graphs.append(compiling.graphs_made() - before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype == "float32" else 1e-2)
    assert len(losses[0]) > 10
    removals = [event for event in events if event["event"] == "prune"]
    assert len(removals) == 3
    assert graphs[0] == 0
    assert 1 <= graphs[1] <= 8, "training and evaluation, fixed and unknown lengths of batches; not one for every event"
    assert any("torch.compile made" in event.get("text", "") for event in events)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "setting",
    [
        "adapter.freeze_a=false",
        *(
            pytest.param(s, marks=pytest.mark.long)
            for s in ("train.gradient_checkpointing=true", "adapter.freeze_a=true")
        ),
    ],
)
def test_in_bf16_gradients_reach_the_pool_through_its_copies(setting, tmp_path):
    """Two micro-batches, before and after a removal; in full precision the same gradient to what bf16 leaves of it."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        how = f"train.compile={str(compiled).lower()}"
        run = assembled(make_recipe(tmp_path, "model.dtype=bfloat16", "adapter.alpha=1", setting, how))
        with torch.no_grad():
            run.trained.halves()[1].normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        if compiled:
            compiling.compile_blocks(run.model, run.trained)
        for keep_every in (None, 2):
            if keep_every:
                shrink(run.trained, run.optimizer, torch.arange(run.trained.components) % keep_every == 0)
            place = run.trained.values.grad.data_ptr()
            for batch in run.batches.step(0, 0):
                with run.accelerator.autocast():
                    summed_loss(run.model, batch).backward()
            assert run.trained.values.grad.data_ptr() == place, "added to what the layers' gradients are views of"
            found.append(run.trained.values.grad.clone())
            run.trained.values.grad.zero_()
    (first, second), (other_first, other_second) = found[:2], found[2:]
    for ours, plain in ((other_first, first), (other_second, second)):
        assert (ours - plain).norm() < 0.02 * plain.norm()
    size_a = run.trained.halves()[0].numel()
    assert (second[:size_a] == 0).all() == (other_second[:size_a] == 0).all() == (setting == "adapter.freeze_a=true")


@pytest.mark.slow
@needs_compiler
def test_the_compiled_loss_is_the_plain_one():
    compiled = compiled_judge()
    for rows in (7, 5, 1):
        logits = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        targets = torch.arange(rows)
        for dtype in (torch.float32, torch.bfloat16):
            exact = logits.double().requires_grad_(True)
            exact_loss = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
            (exact_gradient,) = torch.autograd.grad(exact_loss, exact)
            for judge in (compiled, loss_and_gradient):
                loss_n, grad = judge(logits.clone(), targets, dtype)
                assert_close_to_truth(loss_n.sum(), exact_loss, terms=33 + rows)
                assert_close_to_truth(grad, exact_gradient, terms=33 if dtype == torch.float32 else 1)
