"""The same rows in the same order under `dynlora train` and under transformers' Trainer: the run ends at the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assembled, make_recipe
from tiny_run import train as dynlora_train
from torch.utils.data import SequentialSampler
from trainer_helpers import arguments, losses
from transformers import AutoModelForCausalLM, Trainer

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.runs.log import read_run
from dynlora_cli.trainers import DynamicRankCallback, attach

OPTIONS = ("dataset.shuffle=false", "train.warmup_ratio=0", "train.learning_rate=5e-3")


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def rows_of(recipe: Any) -> list[dict[str, Any]]:
    """The rows of the whole run in its order, as transformers wants them: labels that the model shifts itself."""
    run, found = assembled(recipe), []
    for index in range(run.total_steps):
        for batch in run.batches.step(*divmod(index, run.batches.steps_per_epoch)):
            for line in range(len(batch.rows)):
                real = batch.inputs["attention_mask"][line].bool()
                row = {"input_ids": batch.inputs["input_ids"][line][real]}
                row["labels"] = torch.cat([torch.tensor([-100]), batch.labels[line][real][:-1]])
                found.append(row)
    return found


def together(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=1)
    mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "attaching"),
    [
        ((), {}),
        (("train.max_grad_norm=0.2",), {}),
        (("pruning.policy=magnitude",), {"policy": "magnitude"}),
        (("pruning.policy=gradient",), {"policy": "gradient"}),
        (("pruning.policy=sensitivity",), {"policy": "sensitivity"}),
        (("adapter.variant=dora",), {"variant": "dora"}),
        (("adapter.freeze_a=true",), {"freeze_a": True}),
        (("rank.budget=0.3", "adapter.target_modules=attention"), {"budget": 0.3, "target_modules": "attention"}),
    ],
    ids=["plain", "clipped", "magnitude", "gradient", "sensitivity", "dora", "frozen A", "share"],
)  # fmt: skip
def test_the_run_ends_where_dynlora_train_ends(
    tmp_path: Path, overrides: tuple[str, ...], attaching: dict[str, Any]
) -> None:
    recipe = make_recipe(tmp_path, *OPTIONS, *overrides)
    summary, _ = dynlora_train(recipe)
    theirs = [line["loss"] for line in read_run(tmp_path / "out").metrics if "loss" in line]

    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    attached = attach(model, **({"budget": 2, "init": 8} | attaching))
    callback = DynamicRankCallback(attached, start=0.17, end=0.67, events=3)
    clip = recipe.train.max_grad_norm
    args = arguments(
        tmp_path / "hf", per_device_train_batch_size=2, gradient_accumulation_steps=2, lr_scheduler_type="cosine",
        max_grad_norm=clip, remove_unused_columns=False,
    )  # fmt: skip
    trainer = InOrder(model, args, train_dataset=rows_of(recipe), data_collator=together, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    assert attached.rank_map == summary["ranks"]
    torch.testing.assert_close(losses(trainer), theirs, atol=1e-4, rtol=0)
    events = [(event["event"], event["step"], event["parameters"]) for event in callback.rank_events]
    assert events == [(e["event"], e["step"], e["parameters"]) for e in read_run(tmp_path / "out").rank_events]
    ours, trained = read_adapter(tmp_path / "saved"), read_adapter(tmp_path / "out")
    assert distance(ours, trained) < 1e-3


def distance(one: Adapter, other: Adapter) -> float:
    """The norm of the difference of the updates, as a share of one of them."""
    pairs = [(one.layers[name].delta_OI(), other.layers[name].delta_OI()) for name in one.layers]
    return sum((a - b).norm() for a, b in pairs) / sum(a.norm() for a, _ in pairs)
