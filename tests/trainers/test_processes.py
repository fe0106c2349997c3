"""Two processes under DDP train and prune as one with twice the batch; they stay alike."""

from __future__ import annotations

import json

import pytest
from numeric import same_curve
from processes_helper import two
from safetensors.torch import load_file
from trl_helpers import load

pytestmark = pytest.mark.slow

SCRIPT = """
import hashlib, json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from torch import distributed
from trl_helpers import TRAINERS, load, losses
from dynlora_cli.trainers import DynamicRankCallback, attach

folder, name, more = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
model = load(folder, name)
attached = attach(model, budget=more.pop("budget", 2), init=8)
watcher = DynamicRankCallback(attached, start=0.17, end=0.67, events=3)
resume = more.pop("resume", None)
trainer = TRAINERS[name](folder, model, [watcher], **more)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(str(folder / more["out"] / "saved"))
several = distributed.is_available() and distributed.is_initialized()
mine = {
    "ranks": attached.rank_map,
    "values": hashlib.sha256(attached.pool.values.detach().numpy().tobytes()).hexdigest(),
    "moments": hashlib.sha256(
        torch.cat([trainer.optimizer.state[leaf]["exp_avg"].flatten() for leaf in attached.pool.leaves if leaf.numel()])
        .numpy().tobytes()
    ).hexdigest(),
}
both = [None, None]
if several:
    distributed.all_gather_object(both, mine)
if not several or distributed.get_rank() == 0:
    print(json.dumps({
        "losses": losses(trainer), "both": both, "ranks": attached.rank_map, "parameters": attached.pool.parameters,
        "events": watcher.rank_events,
    }))
"""


def run(folder, name, processes, **more):
    load(folder, name)  # written once, and not by two processes at a time
    out = two(SCRIPT, str(folder), name, json.dumps(more), folder=folder, processes=processes)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "more"),
    [("sft", {}), ("dpo", {}), ("sft", {"gradient_checkpointing": True, "budget": 1})],
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, name, more):
    more = {"gradient_accumulation_steps": 2, "max_steps": 12, **more}
    one = run(tmp_path, name, 1, out="one", per_device_train_batch_size=2, **more)
    found = run(tmp_path, name, 2, out="two", per_device_train_batch_size=1, **more)
    assert found["both"][0] == found["both"][1]
    assert found["ranks"] == one["ranks"]
    if "budget" in more:  # with checkpointing, DDP does not search for what a pass did not reach
        assert 0 in found["ranks"].values()
    assert [loss for loss, _ in found["losses"]] == same_curve([loss for loss, _ in one["losses"]])
    pruned = [[event for event in run["events"] if event["event"] == "prune"] for run in (one, found)]
    assert [event["step"] for event in pruned[0]] == [event["step"] for event in pruned[1]] == [4, 6, 8]
    for event, other in zip(*pruned, strict=True):
        assert event["ranks"] == other["ranks"]
        assert event["predicted_loss_change"] == pytest.approx(other["predicted_loss_change"], rel=1e-2, abs=1e-6)
    adapters = [load_file(tmp_path / out / "saved" / "adapter_model.safetensors") for out in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        assert (adapters[1][key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_two_processes_of_grpo_stay_alike(tmp_path):
    """Each process draws its own answers; what they learn is one."""
    found = run(tmp_path, "grpo", 2, out="two", per_device_train_batch_size=2, bf16=True, gradient_checkpointing=True)
    assert found["both"][0] == found["both"][1]
    assert found["events"][-1]["parameters"] == found["parameters"]


def test_two_processes_go_on_from_a_checkpoint(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 1}
    straight = run(tmp_path, "sft", 2, out="two", **more)
    again = run(tmp_path, "sft", 2, out="again", resume=str(tmp_path / "two" / "checkpoint-5"), **more)
    assert again["both"][0] == again["both"][1]
    assert again["ranks"] == straight["ranks"]
    assert again["losses"][5:] == straight["losses"][5:]
