"""`train --sweep` on the command line: what is refused before anything runs, a plan, failing runs, several devices."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import Dynlora
from pico import pico_recipe
from test_sweep import GRID, NAMES, state_of

from dynlora_cli.errors import MeasureError
from dynlora_cli.training import loop


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_recipe(tmp_path_factory.mktemp("sweep"))


# -- before anything runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sweep", "rank.budget=1,x", "--sweep", "dataset=nowhere.jsonl,rows"), "rank.budget"),
        (("--sweep", "dataset.train=nowhere.jsonl,else.jsonl"), "else.jsonl"),
        (("--sweep", "model.name_or_path=no/such/folder/a,no/such/folder/b"), "folder/b"),
        ((*GRID, "--resume-from", "x"), "goes on with a single run"),
        ((*GRID, "--resume", "--overwrite"), "exclude each other"),
        ((*GRID, "--resume"), "holds no sweep to go on with"),
        ((*GRID, "--devices", "no"), "--devices"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(recipe: Path, tmp_path, arguments, said, dynlora: Dynlora):
    out = tmp_path / "out"
    refused = dynlora("train", recipe, *arguments, "--output-dir", out, "--json")
    assert refused.code == 2
    assert said in refused.err
    assert refused.json["ok"] is False
    assert not out.exists()


def test_a_single_run_and_a_sweep_do_not_share_a_folder(recipe: Path, tmp_path, dynlora: Dynlora):
    swept = tmp_path / "swept"
    assert dynlora("train", recipe, "--sweep", "seed=0", "--output-dir", swept).code == 0
    out = shutil.copytree(swept / "seed-0", tmp_path / "out")
    refused = dynlora("train", recipe, *GRID, "--output-dir", out, "--overwrite")
    assert refused.code == 2
    assert "needs a folder of its own" in refused.err
    assert dynlora("train", recipe, "--output-dir", swept, "--overwrite").code == 2
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    assert dynlora("train", recipe, *GRID, "--output-dir", tmp_path / "else", "--overwrite").code == 2


def test_a_dry_run_shows_what_would_run(recipe: Path, tmp_path, dynlora: Dynlora):
    answer = dynlora("train", recipe, *GRID, "--output-dir", tmp_path / "out", "--dry-run", "--json")
    assert answer.code == 0
    plan = answer.json["plan"]
    assert (plan["count"], [run["run"] for run in plan["runs"]]) == (4, NAMES)
    budgets = [run["plan"] and run["plan"]["parameters"]["budget"] for run in plan["runs"]]
    assert budgets == [1024, None, 2048, None], "one of each combination is planned whole"
    shown = dynlora("train", recipe, *GRID, "--output-dir", tmp_path / "out", "--dry-run").err
    assert all(name in shown for name in NAMES)
    assert "4 runs" in shown
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_no_recipe_file(recipe: Path, tmp_path, dynlora: Dynlora):
    named = (
        "--model",
        recipe.parent / "pico",
        "--dataset",
        recipe.parent / "rows.jsonl",
        "--output-dir",
        tmp_path / "out",
    )
    answer = dynlora("train", *named, "--sweep", "rank.budget=1,2", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert [run["run"] for run in answer.json["plan"]["runs"]] == ["budget-1", "budget-2"]
    assert [run["plan"]["parameters"]["budget"] for run in answer.json["plan"]["runs"]] == [1024, 2048]
    both = dynlora("train", recipe, *named, "--sweep", "rank.budget=1,2", "--dry-run")
    assert (both.code, "says that already" in both.err) == (2, True)


@pytest.mark.slow
def test_several_devices_train_each_run(recipe: Path, tmp_path: Path):
    """On CPUs: two processes for each run; one run fails in them, and what they say is not lost."""
    arguments = [
        "train",
        str(recipe),
        "--sweep",
        "seed=0",
        "--devices",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dynlora_cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["state"] for row in result["runs"]] == ["done"]
    for row in result["runs"]:
        assert json.loads((Path(row["folder"]) / "dynlora.json").read_text("utf-8"))["processes"] == 2


# -- what fails ------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_is_noted_and_the_rest_goes_on(recipe: Path, tmp_path, monkeypatch, dynlora: Dynlora):
    fit = loop.fit

    def fails(run) -> None:
        if run.recipe.seed == 0:
            raise MeasureError("the loss became NaN at step 3")
        fit(run)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("dynlora_cli.commands.train.fit", fails)
        answer = dynlora("train", recipe, *GRID[2:], "--output-dir", out, "--json")
    assert answer.code == 4
    result = answer.json
    assert (result["ok"], result["exit_code"]) == (False, 4)
    assert result["error"] == "1 of 2 runs failed: seed-0"
    assert state_of(out) == ["failed", "done"]
    assert result["runs"][0]["error"] == "the loss became NaN at step 3"
    assert result["combinations"][0]["done"] == 1
    assert "failed: the loss became NaN" in answer.err
    again = dynlora("train", recipe, *GRID[2:], "--output-dir", out, "--resume")
    assert again.code == 0, "and can be tried again"
    assert state_of(out) == ["done"] * 2


@pytest.mark.slow
def test_failures_of_several_kinds_and_bugs(recipe: Path, tmp_path, monkeypatch, dynlora: Dynlora):
    def fails(run) -> None:
        if run.recipe.seed:
            raise MeasureError("NaN")
        raise ValueError("a bug")

    monkeypatch.setattr("dynlora_cli.commands.train.fit", fails)
    answer = dynlora("train", recipe, "--sweep", "seed=0,1", "--output-dir", tmp_path / "out", "--json")
    assert answer.code == 1, "of several codes none is everybody's"
    assert [row["exit_code"] for row in answer.json["runs"]] == [1, 4]
    assert "Traceback" in answer.err, "a bug is shown whole"
    assert answer.json["best"] is None


@pytest.mark.slow
def test_losses_over_other_tokens_are_not_compared(recipe: Path, tmp_path, dynlora: Dynlora):
    answer = dynlora("train", recipe, "--sweep", "dataset.max_length=36,64", "--output-dir", tmp_path / "out", "--json")
    assert answer.code == 0
    assert answer.json["best"] is None
    assert "measured with different held-out rows: their losses do not compare" in " ".join(answer.json["notes"])


def test_without_held_out_rows_there_is_nothing_to_choose_by(recipe: Path, tmp_path, dynlora: Dynlora):
    settings = ("--set", "dataset.val_size=0", "--output-dir", tmp_path / "out", "--json")
    answer = dynlora("train", recipe, "--sweep", "rank.budget=1,2", *settings)
    assert answer.code == 0
    assert answer.json["best"] is None
    assert "no rows are held out" in answer.json["notes"][0]
