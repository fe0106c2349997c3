"""Runs whose rows are read while they train: the same bytes as without, and the same after a stop anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe, model_folder, train, write_rows

from dynlora_cli.commands.dry_run import plan as dry_run
from dynlora_cli.errors import DataError, Interrupted, UsageError
from dynlora_cli.runs.folder import read_record

STREAM = ("dataset.streaming=true", "dataset.shuffle_buffer=12", "dataset.val_size=0", "eval.steps=null")
SHORT = ("rank.init=2", "train.micro_batch_size=4", "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, and `parts` with 28 rows in three files."""
    made = tmp_path_factory.mktemp("streamed")
    model_folder(made)
    parts = made / "parts"
    parts.mkdir()
    rows = write_rows(made / "all.jsonl", 28).read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("a", rows[:9]), ("b", rows[9:12]), ("c", rows[12:])):
        (parts / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    return made


def recipe_of(home: Path, tmp_path: Path, *overrides: str, out: str = "out") -> Any:
    return make_recipe(home, f"dataset.train={home / 'parts'}", *SHORT, *overrides, f"output_dir={tmp_path / out}")


def adapter(tmp_path: Path, out: str = "out") -> bytes:
    return (tmp_path / out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("packing", [False, True])
def test_a_block_that_holds_all_rows_trains_as_they_do_in_memory(home: Path, tmp_path: Path, packing: bool):
    options = (f"dataset.packing={json.dumps(packing)}", "dataset.val_size=0", "eval.steps=null")
    train(recipe_of(home, tmp_path, *options, out="whole"))
    streamed = (*options, "dataset.streaming=true")
    summary, events = train(recipe_of(home, tmp_path, *streamed, out="streamed"))
    assert summary["stream"]["passes"] >= 1  # more than once, each time in another order
    assert adapter(tmp_path, "whole") == adapter(tmp_path, "streamed")
    notes = next(event["notes"] for event in events if event["event"] == "start")
    assert any("28 rows to train on are read at first, and these are all" in note for note in notes)


def test_a_stop_anywhere_leaves_the_same_bytes(home: Path, tmp_path: Path):
    """12 rows a block: 3 blocks, of 3, 3 and 1 steps, are a pass; stops in the first, second and third, and later."""
    train(recipe_of(home, tmp_path, *STREAM, out="at-once"))
    for at in (2, 4, 7, 8, 11):
        recipe = recipe_of(home, tmp_path, *STREAM, out=f"stopped-{at}")
        with pytest.raises(Interrupted):
            train(recipe, interrupt_at=at)
        place = json.loads((tmp_path / f"stopped-{at}/checkpoints/step-{at}/state.json").read_text())["stream"]
        assert (place["number"], place["passes"]) == {2: (0, 0), 4: (1, 0), 7: (3, 0), 8: (3, 0), 11: (4, 1)}[at]
        train(recipe, resume=True)
        assert adapter(tmp_path, f"stopped-{at}") == adapter(tmp_path, "at-once"), at
        assert read_record(tmp_path / f"stopped-{at}")["data"] == {
            **read_record(tmp_path / "at-once")["data"],
            "date": read_record(tmp_path / f"stopped-{at}")["data"]["date"],
        }
