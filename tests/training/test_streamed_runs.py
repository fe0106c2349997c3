"""Runs whose rows are read while they train: the same bytes as without, and the same after a stop anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe, model_folder, train, write_rows

from dynlora_cli.adapters.base import find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.dry_run import plan as dry_run
from dynlora_cli.errors import DataError, Interrupted, UsageError
from dynlora_cli.evaluation.rows import held_out_rows
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


def test_rows_of_held_out_prompts_are_never_trained_on(home: Path, tmp_path: Path):
    recipe = recipe_of(home, tmp_path, "dataset.streaming=true", "dataset.shuffle_buffer=8", "dataset.val_size=0.25")
    summary, _ = train(recipe)
    data = read_record(tmp_path / "out")["data"]
    held, left = data["val_rows"], summary["stream"]["left_out"]
    assert held
    assert left
    assert summary["stream"]["passes"] == 1
    assert data["counts"]["train"]["rows"] == 28 - held - left
    rows = evaluated(tmp_path / "out")
    assert len(rows.examples) == held
    assert not any("changed" in note for note in rows.notes)


def evaluated(folder: Path) -> Any:
    """The held-out rows of a run, as `dynlora eval` reads them."""
    adapter = read_adapter(folder)
    place = find_base(adapter)
    return held_out_rows(adapter, place, read_tokenizer(adapter, place))


def test_a_bad_row_ends_the_run_with_all_saved(home: Path, tmp_path: Path):
    shutil.copytree(home / "parts", tmp_path / "parts")
    options = (*STREAM, "dataset.shuffle=false", "dataset.shuffle_buffer=8", f"dataset.train={tmp_path / 'parts'}")
    recipe = recipe_of(home, tmp_path, *options)
    whole = (tmp_path / "parts/c.jsonl").read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "parts/c.jsonl").write_text("".join([*lines[:9], '{"prompt": 3}\n', *lines[10:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.jsonl:10: .* \(after step 2 of 12, which is saved\)") as caught:
        train(recipe)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("then go on with --resume")
    (tmp_path / "parts/c.jsonl").write_text(whole, encoding="utf-8")
    train(recipe, resume=True)
    train(recipe_of(home, tmp_path, *options, out="at-once"))
    assert adapter(tmp_path) == adapter(tmp_path, "at-once")


def test_resuming_on_other_rows_is_refused(home: Path, tmp_path: Path):
    shutil.copytree(home / "parts", tmp_path / "parts")
    recipe = recipe_of(home, tmp_path, *STREAM, "dataset.shuffle=false", f"dataset.train={tmp_path / 'parts'}")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=4)
    path = tmp_path / "parts/c.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("12:", "twelve:"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"the rows that the run was at \(.*c\.jsonl:1 and those with it\) are not"):
        train(recipe, resume=True)
    path.write_text(whole, encoding="utf-8")
    path.rename(path.with_name("d.jsonl"))
    with pytest.raises(UsageError, match="the rows, or how they are read, have changed"):
        train(recipe, resume=True)


def test_trials_of_the_learning_rate_walk_back_to_the_first_block(home: Path, tmp_path: Path):
    options = ("train.max_steps=140", "train.warmup_steps=1", "pruning.start=0.9", "pruning.end=0.95")
    found = [*STREAM, *options, "dataset.shuffle_buffer=8"]

    def stopped(rate: float | str, out: str) -> dict[str, Any]:
        with pytest.raises(Interrupted):
            train(recipe_of(home, tmp_path, *found, f"train.learning_rate={rate}", out=out), interrupt_at=20)
        state: dict[str, Any] = json.loads((tmp_path / out / "checkpoints/step-20/state.json").read_text())
        return state

    raced = stopped("auto", "raced")
    assert raced["progress"]["rate_from"].startswith("race")
    told = stopped(raced["progress"]["learning_rate"], "told")
    assert raced["stream"] == told["stream"]
    assert raced["sha256"]["adapter_model.safetensors"] == told["sha256"]["adapter_model.safetensors"]


def test_a_dry_run_reads_the_first_block_alone(home: Path, tmp_path: Path):
    shutil.copytree(home / "parts", tmp_path / "parts")
    (tmp_path / "parts/b.jsonl").write_text("no row\n", encoding="utf-8")  # after the 9 rows of a.jsonl
    options = ("dataset.streaming=true", "dataset.shuffle_buffer=8", "dataset.shuffle=false", "eval.steps=null")
    found = dry_run(recipe_of(home, tmp_path, *options, "dataset.val_size=0", f"dataset.train={tmp_path / 'parts'}"))
    assert found["data"]["counts"]["train"]["rows"] == 8
    assert any(
        "8 rows to train on are read at first; how many there are is not known" in note for note in found["notes"]
    )


def test_a_classifier_streams(tmp_path: Path):
    options = ("dataset.shuffle_buffer=16", "dataset.streaming=true", "train.max_steps=12")
    recipe = make_recipe(tmp_path, *options, kind="bert")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    train(recipe, resume=True)
    train(make_recipe(tmp_path, *options, kind="bert", out="at-once"))
    assert adapter(tmp_path) == adapter(tmp_path, "at-once")


def test_rows_that_streamed_are_not_replayed(home: Path, tmp_path: Path):
    train(recipe_of(home, tmp_path, *STREAM, "train.max_steps=2"))
    recipe = recipe_of(home, tmp_path, f"dataset.replay={{from: {tmp_path / 'out'}}}", out="next")
    with pytest.raises(UsageError, match="read its rows while it trained"):
        train(recipe)
