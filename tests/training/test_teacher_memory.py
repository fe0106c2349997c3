"""The memory that a teacher's reading needs, told before a run, against the tensors of a real reading."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_run import assembled, grounded_recipe, make_recipe

from dynlora_cli.commands.dry_run import plan
from dynlora_cli.models.quiet import quiet
from dynlora_cli.training.before.lessons import own_lessons
from dynlora_cli.training.memory_estimate import _Peak


def recipe_of(folder, contexts):
    """Rows of which each has one of the contexts."""
    recipe = grounded_recipe(folder)
    with open(recipe.dataset.train[0].path, "w", encoding="utf-8") as file:
        for number in range(24):
            row = {"prompt": f"{number} is", "completion": "even" if number % 2 == 0 else "odd"}
            file.write(json.dumps({"context": contexts[number % len(contexts)], **row}) + "\n")
    return recipe


def real_peak(recipe):
    """Bytes of the tensors of a real reading, counted the same way."""
    run = assembled(recipe)
    lessons = list(run.objective.lessons(run.data.train))
    held = [*run.model.parameters(), *run.model.buffers(), run.trained.values, run.trained.values.grad]
    with _Peak(torch.device("cpu"), [tensor for tensor in held if tensor is not None]) as peak:
        for batch in own_lessons(run, lessons):
            run.objective.told.learn(run.model, batch)
    return peak.peak


@pytest.mark.parametrize(
    "contexts", [["ab cd " * 10], [f"{number} cd " * 10 for number in range(24)]], ids=["one", "many"]
)
def test_it_is_that_of_a_real_reading(tmp_path, contexts):
    recipe = recipe_of(tmp_path, contexts)
    with quiet:
        told = plan(recipe)["memory"]
    assert told["teacher"] == pytest.approx(real_peak(recipe), rel=0.15)
    parts = ("base", "adapter", "optimizer", "libraries")
    assert told["total"] == sum(told[part] for part in parts) + max(told["activations"], told["teacher"])


def test_it_is_told_and_warned_of_where_it_may_not_fit(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, ["ab cd " * 10])
    with quiet:
        need = plan(recipe)["memory"]
        between = (need["base"] + need["adapter"] + need["optimizer"] + max(need["activations"], need["teacher"])) // 2
        monkeypatch.setattr("dynlora_cli.training.memory_estimate._around", lambda device: (0, between))
        notes = plan(recipe)["notes"]
        assert plan(make_recipe(tmp_path))["memory"]["teacher"] == 0
    assert any("what the teacher reads at once may not fit" in note for note in notes)
