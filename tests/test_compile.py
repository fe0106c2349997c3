"""`train.compile`: the same losses, and code that outlives the pruning events; needs a C++ compiler, as torch.compile does."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_run import lines, make_recipe, train
from torch import nn

from dynlora_cli import compile_blocks as compiling
from dynlora_cli.components import ComponentLinear
from dynlora_cli.errors import MachineError
from dynlora_cli.linear_loss import Heads


def test_blocks_are_what_the_outermost_lists_hold():
    inner = nn.ModuleList([nn.Linear(2, 2)])
    block = nn.Sequential(inner, ComponentLinear(nn.Linear(2, 2), 1.0))
    model = nn.Sequential(nn.Embedding(3, 2), nn.Sequential(nn.ModuleList([block, block])))
    assert list(compiling.blocks(model)) == [block, block]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILERS", (("no-such-compiler",), ("no-such-compiler",)))
    with pytest.raises(MachineError, match=r"one of no-such-compiler"):
        compiling.compile_blocks(nn.Linear(2, 2), None)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, compiling.COMPILERS[0])), reason="torch.compile needs a C++ compiler")
def test_losses_are_those_of_the_plain_run_and_events_need_no_new_code(tmp_path, monkeypatch):
    monkeypatch.setattr(ComponentLinear, "fuse", True)  # both are the process's: put back at the end
    monkeypatch.setattr(Heads, "use", True)
    torch._dynamo.reset()
    before, losses, graphs = compiling.graphs_made(), [], []
    settings = ["rank.budget=4", "eval.steps=12", "train.log_steps=1"]
    for switch in ("false", "true"):
        out = f"out-{switch}"
        _, events = train(make_recipe(tmp_path, *settings, f"train.compile={switch}", out=out))
        losses.append([line["loss"] for line in lines(tmp_path / out / "metrics.jsonl") if "loss" in line])
        graphs.append(compiling.graphs_made() - before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) > 10
    removals = [event for event in events if event["event"] == "prune"]
    assert len(removals) == 3
    assert graphs[0] == 0
    assert 1 <= graphs[1] <= 8, "training and evaluation, fixed and unknown lengths of batches; not one for every event"
    assert any("torch.compile made" in event.get("text", "") for event in events)
