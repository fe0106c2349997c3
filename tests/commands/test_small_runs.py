"""Runs too small to learn or to prune, and what they say; held-out numbers of a run that is resumed."""

from __future__ import annotations

import json

import pytest
from tiny_run import make_recipe

from dynlora_cli.cli.views.evaluation import confusion_in_words
from dynlora_cli.cli.views.progress import Progress
from dynlora_cli.commands import dry_run
from dynlora_cli.commands.train import run
from dynlora_cli.errors import DataError


def test_one_row_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, "dataset.val_size=0", "eval.steps=null")
    (tmp_path / "llama.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(DataError, match="one row"):
        dry_run.plan(recipe)


def test_a_run_of_two_steps_prunes_nothing_and_says_so(tmp_path):
    heard = []
    summary = run(make_recipe(tmp_path, "train.max_steps=2"), listener=heard.append)
    (start,) = [event for event in heard if event["event"] == "start"]
    assert any("2 steps: too few to prune" in note for note in start["notes"])
    assert not [event for event in heard if event["event"] == "prune"]
    assert summary["components"] == summary["components_start"]


def test_held_out_numbers_carry_their_step_and_survive_a_resume():
    progress = Progress()
    known = [{"step": 0, "loss": 5.5}, {"step": 40, "loss": 4.5}]
    progress.hear({"event": "start", "run": {"steps": 90, "held_out": known}, "layers": []})
    line = progress.line({"event": "train", "step": 50, "loss": 4.0})
    assert "held-out 4.5000 (at 40)" in line
    assert progress.held_out_first == 5.5


def test_the_confusion_matrix_in_words():
    assert confusion_in_words([[95, 2, 0], [0, 0, 0], [1, 0, 0]], ["ham", "eggs", "spam"]) == [
        "of 97 rows of ham 95 are right, 2 taken for eggs",
        "of 1 row of spam 0 are right, 1 taken for ham",
    ]
