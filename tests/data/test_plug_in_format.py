"""A format of rows is one new file: the tutorial's, chosen by its columns or by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import Dynlora
from tiny_run import make_recipe
from tutorials import code_of

from dynlora_cli import plugins
from dynlora_cli.config.load import to_yaml
from dynlora_cli.data.forms import Pair

ROWS = [{"question": f"Which is {n}?", "choices": [str(n + 1), str(n), "none"], "answer": n % 2} for n in range(12)]


@pytest.fixture(autouse=True)
def quiz(plug_in: Callable[..., Path]) -> None:
    (code,) = code_of("formats").values()
    plug_in("formats", "quiz", code)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(folder: Path, form: str, rows: list[dict]) -> Path:
    source = json.dumps([{"path": str(write(folder / "quiz.jsonl", rows)), "format": form}])
    path = folder / f"{form}.yaml"
    settings = f"dataset.train={source}", "train.max_steps=2", "eval.steps=2"
    path.write_text(to_yaml(make_recipe(folder, *settings, out=form)), encoding="utf-8")
    return path


def test_a_row_becomes_a_prompt_and_its_answer():
    found = plugins.load("formats", "quiz").to_example(ROWS[1], has_template=False)
    assert found == Pair("Which is 1?\nA. 2\nB. 1\nC. none\nAnswer: ", "B")


@pytest.mark.parametrize("form", ["quiz", "auto"])
def test_it_trains(tmp_path: Path, dynlora: Dynlora, form: str):
    answer = dynlora("train", recipe_of(tmp_path, form, ROWS))
    assert answer.code == 0, answer.err
    assert ("format quiz, chosen by its columns" in " ".join(answer.err.split())) == (form == "auto")


def test_a_wrong_row_is_answered_with_its_place(tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("train", recipe_of(tmp_path, "quiz", [*ROWS[:4], ROWS[4] | {"answer": 7}, *ROWS[5:]]))
    assert answer.code == 2
    words = " ".join(answer.err.split())
    assert "quiz.jsonl:5" in words
    assert "column 'answer' is 7, expected the number of one of the choices, from 0" in words


def test_a_wrong_name_is_answered_with_the_right_one(tmp_path: Path, dynlora: Dynlora):
    path = recipe_of(tmp_path, "quiz", ROWS)
    path.write_text(path.read_text(encoding="utf-8").replace("format: quiz", "format: quizz"), encoding="utf-8")
    answer = dynlora("train", path)
    assert answer.code == 2
    assert "did you mean 'quiz'?" in " ".join(answer.err.split())
