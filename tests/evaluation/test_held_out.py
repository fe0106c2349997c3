"""Which rows an adapter is measured on, and that they are read as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from eval_helpers import Run
from tiny_run import make_recipe, write_rows

from dynlora_cli.adapters.base import find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.evaluation.rows import Rows, held_out_rows
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.setup import read_data

CHANGED = "have changed since training"


def rows_of(run: Path, data: Path | None = None) -> Rows:
    adapter = read_adapter(run)
    place = find_base(adapter)
    return held_out_rows(adapter, place, read_tokenizer(adapter, place), data)


def trained_by(llama: Run, folder: Path, *settings: str, **dataset: Any) -> Path:
    """The run as if it had been trained by another recipe."""
    recipe = make_recipe(folder, f"model.name_or_path={llama.folder.parent / 'llama'}", *settings)
    run = folder / "run"
    shutil.copytree(llama.folder, run, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((run / "dynlora.json").read_text())
    record["recipe"] = recipe.model_dump(mode="json")
    record["recipe"]["dataset"] |= dataset
    if not dataset:
        record["data"]["sha256"] = read_data(recipe, BaseFiles.find(recipe.model)).sha256
    (run / "dynlora.json").write_text(json.dumps(record))
    return run


@pytest.mark.parametrize("budget", ["2", "auto"])
def test_rows_that_have_not_changed_since_training(budget: str, llama: Run, tmp_path: Path):
    """With an automatic budget, training goes without the rows that it chooses the rank by."""
    run = trained_by(llama, tmp_path, f"rank.budget={budget}")
    assert not any(CHANGED in note for note in rows_of(run).notes)
    write_rows(tmp_path / "llama.jsonl", 39)
    assert any(CHANGED in note for note in rows_of(run).notes)


def test_all_rows_of_a_file_whatever_the_recipe_says_of_its_own(llama: Run, tmp_path: Path):
    run = trained_by(llama, tmp_path, "eval.max_samples=3")
    assert len(rows_of(run).examples) == 3
    assert len(rows_of(run, tmp_path / "llama.yaml").examples) == 8, "that recipe's own, and it names no number"
    assert len(rows_of(run, write_rows(tmp_path / "other.jsonl", 17)).examples) == 17


QUESTIONS = [{"question": f"{n}?", "answer": f"{n}!", "text": f"no {n}"} for n in range(4)]
COLUMNS = {"prompt": "question", "completion": "answer"}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"columns": COLUMNS, "format": "completion"}], "<s>0?0!</s>"),
        ([{"columns": COLUMNS, "format": "completion"}] * 2, "<s>0?0!</s>"),
        ([{"columns": {"text": "answer"}}, {"columns": {"text": "question"}}], "<s>no 0</s>"),
        ([{"columns": {"prompt": "question", "completion": "gone"}, "format": "completion"}], "<s>no 0</s>"),
    ],
    ids=["one source", "two alike", "two that differ", "columns that are not there"],
)
def test_a_file_is_read_as_the_training_rows_were(
    sources: list[dict[str, Any]], expected: str, llama: Run, tmp_path: Path
):
    run = trained_by(llama, tmp_path, train=[{"path": "gone.jsonl", **source} for source in sources])
    rows = rows_of(run, write(tmp_path / "questions.jsonl", QUESTIONS))
    adapter = read_adapter(run)
    text = read_tokenizer(adapter, find_base(adapter)).decode(rows.examples[0].input_ids)
    assert text == expected
    said = any("columns as in training: prompt=question, completion=answer" in note for note in rows.notes)
    assert said is ("?" in expected)


def test_rows_that_do_not_fit_are_not_said_to_be_training_rows(llama: Run, tmp_path: Path):
    run = trained_by(llama, tmp_path)
    path = write_rows(tmp_path / "other.jsonl", 3)
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(json.loads(path.read_text().splitlines()[0]) | {"prompt": "word " * 2000}), file=file)
    rows = rows_of(run, path)
    assert len(rows.examples) == 3
    assert any(note.startswith("rows to measure: 1 row dropped") for note in rows.notes)


def test_a_file_of_another_form_than_the_training_rows(llama: Run, tmp_path: Path):
    run = trained_by(llama, tmp_path, train=[{"path": "gone.jsonl", "format": "alpaca"}])
    rows = rows_of(run, write_rows(tmp_path / "other.jsonl", 5))
    assert any("format completion, chosen by its columns" in note for note in rows.notes)
