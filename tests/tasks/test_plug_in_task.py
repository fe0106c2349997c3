"""A task, and an objective with a key of its own, are one new file each: the tutorials', used by the real commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import Dynlora
from tiny_run import make_recipe
from tutorials import code_of

from dynlora_cli.runs.folder import read_record


def test_a_task_is_one_new_file(tmp_path: Path, dynlora: Dynlora, plug_in: Callable[..., Path]):
    (code,) = code_of("tasks").values()
    plug_in("tasks", "last-token", code)
    recipe = make_recipe(tmp_path, "model.task=last-token", "train.max_steps=2")
    path = tmp_path / "last.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    answer = dynlora("train", path, "--json")
    assert answer.code == 0, answer.err
    record = read_record(tmp_path / "out")
    assert record["task"] == "last-token"
    counts = record["data"]["counts"]["train"]
    assert counts["supervised"] == counts["rows"]
    measured = dynlora("eval", "--adapter", tmp_path / "out", "--json", "--generate", "0")
    assert measured.code == 0, measured.err
    assert measured.json["adapters"][0]["tokens"] == record["data"]["counts"]["val"]["rows"]


@pytest.mark.slow
def test_an_objective_is_one_new_file(tmp_path: Path, dynlora: Dynlora, plug_in: Callable[..., Path]):
    (code,) = code_of("objectives").values()
    plug_in("objectives", "smooth", code)
    losses = {}
    for out, settings in (("plain", ()), ("none", ("smoothing=0",)), ("some", ("smoothing=0.2",))):
        chosen = ["train.objective=smooth", *(f"train.{setting}" for setting in settings)] if settings else []
        recipe = make_recipe(tmp_path, "train.max_steps=2", *chosen, out=out)
        path = tmp_path / f"{out}.yaml"
        path.write_text(recipe.model_dump_json(), encoding="utf-8")
        answer = dynlora("train", path, "--json")
        assert answer.code == 0, answer.err
        losses[out] = answer.json["loss_after"]
    assert abs(losses["none"] - losses["plain"]) < 1e-4
    assert abs(losses["some"] - losses["plain"]) > 1e-4
