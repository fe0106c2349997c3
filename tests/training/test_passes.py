"""`train.epochs: auto`: how often rows come up where nothing says it, and which adapter such a run keeps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from tiny_run import assembled, make_recipe, train, write_rows

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.resume import _by_options, same_recipe
from dynlora_cli.drafts.starter import draft
from dynlora_cli.errors import UsageError
from dynlora_cli.training.batches import passes


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(8, 4), (150, 4), (200, 3), (300, 2), (4000, 2), (7990, 2), (8000, 1), (50_000, 1), (5_000_000, 1)],
)
def test_rows_come_up_twice_few_more_often_and_many_once(tmp_path: Path, rows: int, expected: int):
    options = make_recipe(tmp_path).train
    assert options.epochs == "auto"
    assert passes(options, -(-rows // 8)) == expected
    assert passes(options.model_copy(update={"epochs": 7}), -(-rows // 8)) == 7


@pytest.mark.slow
def test_a_run_that_chose_its_length_says_so_and_keeps_the_best(tmp_path: Path):
    """At such a rate it learns 32 rows by heart, and is worse at the end than it was on the way."""
    rate = "train.learning_rate=0.03"
    summary, events = train(make_recipe(tmp_path, "train.max_steps=null", rate))
    assert summary["steps"] == 4 * 8
    told = [event["text"] for event in events if event["event"] == "note"] + events[0].get("notes", [])
    assert any("train.epochs: auto is 4 passes over 32 rows, 32 steps" in text for text in told)
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "eval" and event["step"]}
    met = min(event["step"] for event in events if event["event"] == "eval" and event["best"])
    assert summary["adapter"] == "best"
    assert summary["loss_after"] == min(loss for step, loss in losses.items() if step >= met)


def test_where_no_rows_are_held_out_no_best_one_is_promised(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, "train.max_steps=null", "dataset.val_size=0", "eval.steps=null"))
    (note,) = [text for text in run.data.notes if "train.epochs" in text]
    assert note.endswith("40 steps; no rows are held out to choose the best by, so the adapter is the last")


def test_a_pass_is_over_as_many_rows_as_their_weights_say(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    weighted = f'dataset.train=[{{"path": "{rows}", "weight": 0.25}}]'
    run = assembled(make_recipe(tmp_path, "train.max_steps=null", weighted))
    (note,) = [text for text in run.data.notes if "train.epochs" in text]
    assert "4 passes over 8 rows, 8 steps" in note


def test_a_first_recipe_leaves_the_length_open(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(draft(str(rows), "builtin:tiny").text("train", "out"), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").train.epochs == "auto"


def test_a_run_with_a_number_of_steps_is_as_it_was(tmp_path: Path):
    one, events = train(make_recipe(tmp_path))
    assert (one["steps"], one["adapter"]) == (12, "last")
    assert not any("train.epochs" in str(event) for event in events if event["event"] == "note")
    other = make_recipe(tmp_path, "train.epochs=1")  # the default of older versions
    same_recipe(tmp_path / "out", other)
    with pytest.raises(UsageError, match="max_steps: 12 then") as refused:
        same_recipe(tmp_path / "out", make_recipe(tmp_path, "train.max_steps=null"))
    assert "(--set train.max_steps=12)" in refused.value.hint


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ({"a.b": 3, "c": None}, "(--set a.b=3 --set c=null)"),
        ({"a.b": True, "c": 1e-05}, "(--set a.b=true --set c=1.0e-05)"),
        ({"a.b": "/my dir/x; rm", "c": "true"}, """(--set 'a.b=/my dir/x; rm' --set 'c='"'"'true'"'"'')"""),
        ({"a.b": [1], "c": 1}, ""),
        ({"c": 1}, ""),  # a key that the other recipe did not have
    ],
)
def test_options_bring_back_what_was_and_can_be_copied(before: dict, options: str):
    found = _by_options(["a.b", "c"], before).strip()
    assert found == options
    for option in shlex.split(found.strip("()"))[1::2]:
        key, _, value = option.partition("=")
        assert yaml.safe_load(value) == before[key]
