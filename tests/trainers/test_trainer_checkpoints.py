"""What a trainer saves and goes on from, with components that go in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trainer_helpers import losses, rows, tiny_llama, trainer_of

from dynlora_cli.errors import UsageError
from dynlora_cli.trainers import Attached, DynamicRankCallback, attach

EVERY_SECOND = {"save_strategy": "steps", "save_steps": 2}


def answers(model: Any) -> torch.Tensor:
    """What a model computes from a fixed text."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19)[None]).logits


def test_a_checkpoint_and_the_final_folder_are_plain_adapters(tmp_path: Path) -> None:
    trainer, attached, callback = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "final"))
    torch.testing.assert_close(answers(loaded), answers(attached.model), atol=1e-5, rtol=0)
    assert (answers(loaded) - answers(tiny_llama())).abs().max() > 0.1
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert max(attached.rank_map.values()) == config["r"] == config["lora_alpha"]

    between = tmp_path / "run" / "checkpoint-6"  # after one event of three
    exact = load_file(between / "model.safetensors")
    ranks = {name.removesuffix(".a_CI"): len(tensor) for name, tensor in exact.items() if name.endswith(".a_CI")}
    assert ranks == callback.rank_events[1]["ranks"] != attached.rank_map
    assert not any("base" in name for name in exact)  # no weight of the base is in it
    loaded = PeftModel.from_pretrained(tiny_llama(), str(between))
    again = tiny_llama()
    attach(again, 2, init=8)
    again.load_state_dict(exact, strict=False)
    torch.testing.assert_close(answers(loaded), answers(again), atol=1e-5, rtol=0)


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optim": "adafactor"},
    "8 bits": {"optim": "adamw_bnb_8bit"},
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "bf16": True},
    "sensitivity": {"attaching": {"policy": "sensitivity"}},
    "sora": {"attaching": {"variant": "sora"}},
    "dora": {"attaching": {"variant": "dora"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("changed", WAYS.values(), ids=WAYS)
def test_a_run_goes_on_bit_for_bit_from_before_between_and_after_its_events(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    trainer, attached, callback = trainer_of(tmp_path / "whole", **EVERY_SECOND, **changed)
    trainer.train()
    for step in (2, 6, 10):  # events are after steps 3, 5, 7 and 9
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"from-{step}" / f"checkpoint-{step}")
        later, other, watching = trainer_of(tmp_path / f"from-{step}", **EVERY_SECOND, **changed)
        later.train(resume_from_checkpoint=True)
        assert losses(later) == losses(trainer)
        assert other.rank_map == attached.rank_map
        for mine, theirs in zip(other.pool.leaves, attached.pool.leaves, strict=True):
            assert torch.equal(mine, theirs)
        told = [{**event, "seconds": 0} for event in watching.rank_events]
        assert told == [{**event, "seconds": 0} for event in callback.rank_events]


@pytest.mark.slow
def test_the_best_checkpoint_is_one_within_the_budget(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(
        tmp_path, **EVERY_SECOND, options={"eval_dataset": rows()[:8]}, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min((10, 12), key=measured.__getitem__)
    assert min(measured, key=measured.__getitem__) < 10  # an earlier one was better, and larger
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert attached.parameters <= attached.start.budget
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[best], abs=1e-5)
    trainer.train()  # again, with the optimizer that there is: it steps what was read
    assert attached.parameters <= attached.start.budget


def test_a_larger_checkpoint_is_read_into_a_pruned_model(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(tmp_path, **EVERY_SECOND)
    trainer.train()
    pruned = attached.parameters
    attached.model.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"), strict=False)
    assert attached.parameters == attached.start.parameters > pruned
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(answers(loaded), answers(attached.model), atol=1e-5, rtol=0)


def _trained_elsewhere(tmp_path: Path, attaching: Any, pruning: Any) -> tuple[Any, Attached, DynamicRankCallback]:
    trainer_of(tmp_path, **EVERY_SECOND)[0].train()
    return trainer_of(tmp_path, attaching=attaching, pruning=pruning)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attaching", "pruning", "what"),
    [
        ({"policy": "magnitude"}, {"start": 0.25, "end": 0.75, "events": 3}, "pruning.policy: 'fisher' then"),
        ({}, {"start": 0.25, "end": 0.75, "events": 2}, "pruning.events: 3 then, 2 now"),
        ({"variant": "sora"}, {"start": 0.25, "end": 0.75, "events": 3}, "of another size"),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(
    tmp_path: Path, attaching: dict[str, Any], pruning: dict[str, Any], what: str
) -> None:
    later, _, _ = _trained_elsewhere(tmp_path, attaching, pruning)
    with pytest.raises(UsageError, match=what):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.slow
def test_a_checkpoint_without_rank_control_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, **EVERY_SECOND)[0].train()
    state = tmp_path / "checkpoint-6" / "model.safetensors"
    from safetensors.torch import save_file

    save_file({k: v for k, v in load_file(state).items() if not k.startswith("dynlora")}, state, {"format": "pt"})
    later, _, _ = trainer_of(tmp_path)
    with pytest.raises(UsageError, match="holds no rank control"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
