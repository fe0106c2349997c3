"""Rows that compare or judge answers, in the forms of others, under `dynlora init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora

from dynlora_cli.config.load import load_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(rows: list[dict[str, Any]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("label", [-1, "-1", "good", "Bad", "thumbs_up", "👎"])
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_answers_judged_in_other_marks_are_never_learned_as_right_ones(label: Any, column: str, dynlora: Dynlora):
    write([{"prompt": f"{number} + 1 =", "completion": "7", column: label} for number in range(4)])
    answer = dynlora("init", "rows.jsonl")
    assert (answer.code, Path("recipe.yaml").exists()) == (2, False)
    assert "write the labels as true and false" in answer.err


def test_train_refuses_them_as_well(dynlora: Dynlora):
    write([{"prompt": f"{number} + 1 =", "completion": "7", "label": [1, -1][number % 2]} for number in range(8)])
    Path("r.yaml").write_text("model: builtin:tiny\ndataset: rows.jsonl\n", encoding="utf-8")
    answer = dynlora("train", "r.yaml", "--dry-run")
    assert answer.code == 2
    assert "tells good answers from bad ones" in answer.err
    assert "ignore: [label]" in answer.err


def test_a_label_that_is_a_class_judges_nothing(dynlora: Dynlora):
    write([{"prompt": f"{number} + 1 =", "completion": "7", "label": "sums"} for number in range(4)])
    answer = dynlora("init", "rows.jsonl", "--json")
    assert (answer.code, answer.json["objective"], answer.json["format"]) == (0, None, "completion")


def openai_row(number: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Say {number}."}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": f"{number}, of course."}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }


def test_rows_as_openai_has_them_for_preferences(dynlora: Dynlora):
    write([openai_row(number) for number in range(6)])
    answer = dynlora("init", "rows.jsonl", "--json")
    assert (answer.code, answer.json["objective"]) == (0, "dpo"), answer.err
    columns = {"chosen": "preferred_output", "rejected": "non_preferred_output", "prompt": "input"}
    assert load_recipe(Path("recipe.yaml")).dataset.train[0].columns == columns
    tried = dynlora("train", "recipe.yaml", "--dry-run")
    assert (tried.code, "Say 0." in tried.err, "of course" in tried.err) == (0, True, True), tried.err


def test_objectives_are_known_by_what_they_say_of_themselves(dynlora: Dynlora):
    write([{"prompt": f"{number}?", "chosen": f"{number}", "rejected": "no"} for number in range(4)])
    assert dynlora("init", "rows.jsonl").code == 0
    line = next(line for line in Path("recipe.yaml").read_text().splitlines() if "objective:" in line)
    assert line.split("# ")[1] == "which of two answers is better | orpo | kto"
    assert "  beta: 0.1 " in Path("recipe.yaml").read_text()
