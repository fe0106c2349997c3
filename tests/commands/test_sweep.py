"""`dynlora train --sweep`: runs as they would be alone, going on, what fails, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_helpers import Dynlora
from pico import pico_recipe

from dynlora_cli.cli.app import main
from dynlora_cli.cli.views.sweep import SweepView
from dynlora_cli.commands import sweep
from dynlora_cli.commands.sweep import SharedRows
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data import load as data
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.setup import read_data

GRID = ("--sweep", "rank.budget=1,2", "--sweep", "seed=0,1")
NAMES = [f"budget-{budget}_seed-{seed}" for budget in (1, 2) for seed in (0, 1)]
OF_THE_CLOCK = ("timings", "peak_memory_bytes", "started", "finished", "births", "run_id", "name", "summary")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_recipe(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def swept(recipe: Path) -> Path:
    """The folder of a finished sweep; not to be changed."""
    folder = recipe.parent / "swept"
    assert command("train", recipe, *GRID, "--output-dir", folder) == 0
    return folder


@pytest.fixture
def mine(swept: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, in its place: runs know where they are."""
    kept = tmp_path / "kept"
    shutil.copytree(swept, kept)
    yield swept
    shutil.rmtree(swept)
    shutil.move(kept, swept)


def state_of(folder: Path) -> list[str]:
    return [row["state"] for row in json.loads((folder / "sweep.json").read_text("utf-8"))["runs"]]


def moment(folder: Path) -> str:
    return json.loads((folder / "dynlora.json").read_text("utf-8"))["started"] + str(
        (folder / "dynlora.json").stat().st_mtime_ns
    )


def without_clock(folder: Path) -> dict:
    record = json.loads((folder / "dynlora.json").read_text("utf-8"))
    record["recipe"].pop("output_dir")
    losses = {key: record["summary"][key] for key in ("loss_before", "loss_after", "parameters", "learning_rate")}
    record["data"].pop("date")
    return {key: value for key, value in record.items() if key not in (*OF_THE_CLOCK, "recipe_yaml")} | losses


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert without_clock(one) == without_clock(other)


# -- the runs --------------------------------------------------------------------------------------------------------


def test_each_run_is_what_the_same_recipe_gives_alone(recipe: Path, swept: Path, tmp_path: Path, dynlora: Dynlora):
    assert sorted(path.name for path in swept.iterdir() if path.is_dir()) == NAMES
    for name in NAMES[1:]:
        budget, seed = name.replace("budget-", "").replace("seed-", "").split("_")
        out = tmp_path / name
        settings = ("--set", f"rank.budget={budget}", "--set", f"seed={seed}")
        assert dynlora("train", recipe, *settings, "--output-dir", out).code == 0
        assert_same_run(swept / name, out)
        assert (swept / name / "report.html").is_file()


@pytest.mark.slow
def test_and_what_it_gives_in_a_process_of_its_own(recipe: Path, swept: Path, tmp_path: Path):
    settings = ["--set", "rank.budget=2", "--set", "seed=1", "--output-dir", str(tmp_path / "out")]
    arguments = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), *settings]
    subprocess.run(arguments, check=True, capture_output=True)
    assert_same_run(swept / NAMES[-1], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "settings"),
    [
        ("train.learning_rate=0.001,auto", ()),
        ("model.dtype=bfloat16,float32", ()),
        ("adapter.init_weights=pissa,default", ("--set", "adapter.dropout=0.1")),
        ("dataset.max_length=48,64", ("--set", "dataset.packing=true")),
        ("adapter.new_tokens=[<a>],[<b>]", ()),
    ],
)
def test_what_ran_before_in_the_process_changes_nothing(recipe: Path, axis: str, settings, tmp_path, dynlora: Dynlora):
    answer = dynlora("train", recipe, "--sweep", axis, *settings, "--output-dir", tmp_path / "sweep", "--json")
    assert answer.code == 0, answer.err
    key, last = axis.split("=")[0], answer.json["runs"][-1]
    value = json.dumps(last["values"][key])
    assert dynlora("train", recipe, *settings, "--set", f"{key}={value}", "--output-dir", tmp_path / "alone").code == 0
    assert_same_run(tmp_path / "sweep" / last["run"], tmp_path / "alone")


@pytest.mark.slow
def test_rows_are_read_once_for_all_runs_that_read_the_same(recipe: Path, tmp_path, monkeypatch, dynlora: Dynlora):
    read = []
    load = data.load_data
    monkeypatch.setattr(data, "load_data", lambda *args, **how: (load(*args, **how), read.append(how["seed"]))[0])
    axes = ("--sweep", "train.learning_rate=0.001,0.002", "--sweep", "seed=0,1")
    assert dynlora("train", recipe, *axes, "--output-dir", tmp_path / "out").code == 0
    assert read == [0, 1], "each seed holds out other rows"


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        ("rank.budget=7", False),
        ("train.micro_batch_size=2", False),
        ("dataset.val_size=0.3", True),
        ("dataset.chat=false", True),
        ("seed=1", True),
        ("train.objective=dpo", True),
        ("adapter.new_tokens=[<b>]", True),
        ("model.name_or_path=builtin:tiny", True),
    ],
)
def test_rows_are_read_again_where_they_might_be_others(recipe: Path, setting: str, again: bool, monkeypatch):
    read, rows = [], data.Data([], [], None, [], {}, "")
    monkeypatch.setattr(data, "load_data", lambda *_, **__: read.append(1) or rows)
    shared, tokenizer = SharedRows(), SimpleNamespace(chat_template="x", __len__=lambda: 3)
    monkeypatch.setattr(sweep, "_state_of", lambda _: ("x", None, None, 3))
    for changes in (["adapter.new_tokens=[<a>]"] if "new_tokens" in setting else [], [setting]):
        one = load_recipe(recipe, changes)
        assert shared.of(one)(one.dataset, tokenizer, task=None, seed=one.seed) == rows
    assert len(read) == 1 + again


def test_rows_on_the_disk_are_opened_by_each_run(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DYNLORA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "yes"}) + "\n" for n in range(20)))
    one = load_recipe(pico_recipe(tmp_path, dataset={"train": [str(rows)], "cache": True, "workers": 1}))
    shared, files = SharedRows(), BaseFiles.find(one.model)
    first, second = (read_data(one, files, load=shared.of(one)) for _ in range(2))
    assert list(first.train) == list(second.train)
    assert first.train.files is not second.train.files


@pytest.mark.slow
def test_rows_that_a_run_changes_are_new_for_the_next(tmp_path: Path, dynlora: Dynlora):
    """An objective that compares hangs itself, and what its reference said, on the rows."""
    rows = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = pico_recipe(
        tmp_path,
        dataset={"train": [str(file)], "val_size": 0.2, "max_length": 64},
        train={"objective": "dpo", "max_steps": 4, "micro_batch_size": 4, "learning_rate": 0.005},
    )
    assert dynlora("train", recipe, "--sweep", "rank.budget=1,2", "--output-dir", tmp_path / "sweep").code == 0
    assert dynlora("train", recipe, "--output-dir", tmp_path / "alone").code == 0
    assert_same_run(tmp_path / "sweep" / "budget-2", tmp_path / "alone")


# -- the result ------------------------------------------------------------------------------------------------------


def test_the_result_is_one_object_and_the_same_as_in_the_folder(recipe: Path, swept: Path, dynlora: Dynlora):
    answer = dynlora("train", recipe, *GRID, "--output-dir", swept, "--resume", "--json")
    assert answer.code == 0
    result = answer.json
    on_disk = json.loads((swept / "sweep.json").read_text("utf-8"))
    assert {key: result[key] for key in on_disk} == on_disk
    assert [row["run"] for row in result["runs"]] == NAMES
    for row in result["runs"]:
        summary = json.loads((swept / row["run"] / "dynlora.json").read_text("utf-8"))["summary"]
        assert (row["measured"]["loss"], row["parameters"]) == (summary["loss_after"], summary["parameters"])
    one, two = result["combinations"]
    assert one["values"] == {"rank.budget": 1}
    assert one["seeds"] == [0, 1]
    assert one["low"] < one["mean"]["loss"] < one["high"]
    assert one["best"] != two["best"]
    assert "each seed holds out other rows" in " ".join(result["notes"])


def test_what_to_type_next_names_the_best(recipe: Path, swept: Path, dynlora: Dynlora):
    answer = dynlora("train", recipe, *GRID, "--output-dir", swept, "--resume", "--json")
    best = answer.json["best"]
    assert best in NAMES
    other = {"1": "2", "2": "1"}[best[7]]
    against = best.replace(f"budget-{best[7]}", f"budget-{other}")
    first, second, *_ = answer.json["next"]
    assert first.endswith(f"eval --adapter {swept / best}")
    assert second.endswith(f"--adapter {swept / best} --adapter {swept / against}"), "of the same seed: the same rows"
    assert "optimistic" in answer.err


def test_the_folder_of_a_sweep_stands_for_its_best_run(swept: Path, dynlora: Dynlora):
    best = json.loads((swept / "sweep.json").read_text("utf-8"))["best"]
    record = swept / (next(name for name in NAMES if name != best)) / "dynlora.json"
    before = record.stat()
    os.utime(record, (before.st_atime, before.st_mtime + 1000))  # another one is the newest
    try:
        answer = dynlora("inspect", "--adapter", swept)
        assert answer.code == 0
        assert f"{swept / best}, the best of the sweep in" in " ".join(answer.err.split())
    finally:
        os.utime(record, (before.st_atime, before.st_mtime))


def test_a_sweep_of_one_run_compares_it_with_nothing(recipe: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("train", recipe, "--sweep", "rank.budget=1", "--output-dir", tmp_path / "one", "--json")
    assert answer.code == 0
    assert [line for line in answer.json["next"] if line.count("--adapter") > 1] == []


def test_a_person_sees_a_table(recipe: Path, swept: Path, dynlora: Dynlora):
    shown = dynlora("train", recipe, *GRID, "--output-dir", swept, "--resume").err
    assert shown.count("done before") == 4
    assert "held-out loss" in shown
    assert "…" not in shown
    assert "4 of 4 runs done." in shown
    card = (swept / "README.md").read_text("utf-8")
    assert card.count("\n| ") == 4
    assert "**best**" in card


# -- going on --------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, run: int, step: int, times: int = 1) -> None:
    """Ctrl-C at a step of a run, once or twice."""
    hear = SweepView.__call__
    seen = []

    def heard(self: SweepView, event: dict) -> None:
        hear(self, event)
        seen.append(event["event"] == "sweep-run")
        if sum(seen) == run and event["event"] == "tick" and event["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SweepView, "__call__", heard)


def test_an_interrupted_sweep_goes_on_to_the_same_end(
    recipe: Path, swept: Path, tmp_path, monkeypatch, dynlora: Dynlora
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, run=2, step=3)  # which is told before the step ends
        stopped = dynlora("train", recipe, *GRID, "--output-dir", out)
    assert stopped.code == 130
    assert f"interrupted in run 2 of 4, {NAMES[1]}: interrupted after step 4 of 6" in stopped.err
    assert "1 run done, 2 not begun" in stopped.err
    assert "--resume goes on" in stopped.err
    assert state_of(out) == ["done", "interrupted", "waiting", "waiting"]
    assert dynlora("train", recipe, *GRID, "--output-dir", out).code == 2, "what is there is not replaced unasked"
    first = moment(out / NAMES[0])
    again = dynlora("train", recipe, *GRID, "--output-dir", out, "--resume")
    assert again.code == 0
    assert moment(out / NAMES[0]) == first, "what was done is kept"
    assert "resuming from" in again.err
    assert state_of(out) == ["done"] * 4
    for name in NAMES:
        assert_same_run(out / name, swept / name)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_it_goes_on_all_the_same(
    recipe: Path, swept, tmp_path, monkeypatch, dynlora: Dynlora
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, run=1, step=2, times=2)
        assert dynlora("train", recipe, "--sweep", "seed=1", "--output-dir", out).code == 130
    assert state_of(out) == ["interrupted"]
    again = dynlora("train", recipe, "--sweep", "seed=1", "--output-dir", out, "--resume")
    assert again.code == 0, "with nothing saved: anew"
    assert_same_run(out / "seed-1", swept / "budget-2_seed-1")


@pytest.mark.slow
def test_a_sweep_can_grow(recipe: Path, mine: Path, dynlora: Dynlora):
    before = [moment(mine / name) for name in NAMES]
    answer = dynlora(
        "train", recipe, "--sweep", "rank.budget=1,2,3", *GRID[2:], "--output-dir", mine, "--resume", "--json"
    )
    assert answer.code == 0
    assert [moment(mine / name) for name in NAMES] == before
    assert [one["done"] for one in answer.json["combinations"]] == [2, 2, 2]
    smaller = dynlora("train", recipe, "--sweep", "rank.budget=2", *GRID[2:], "--output-dir", mine, "--resume")
    assert "also holds runs of another sweep: budget-1_seed-0, budget-1_seed-1, budget-3_seed-0" in smaller.err


def test_runs_of_another_recipe_are_not_taken_for_these(recipe: Path, swept: Path, dynlora: Dynlora):
    before = (swept / "sweep.json").read_bytes()
    refused = dynlora("train", recipe, *GRID, "--set", "train.max_steps=7", "--output-dir", swept, "--resume")
    assert refused.code == 2
    assert refused.err.count("was made by another recipe") == 4, "all of them at once"
    assert "train.max_steps: 6 then, 7 now" in refused.err
    assert (swept / "sweep.json").read_bytes() == before


def test_overwrite_trains_anew(recipe: Path, mine: Path, dynlora: Dynlora):
    before = [moment(mine / name) for name in NAMES]
    assert (
        dynlora("train", recipe, "--sweep", "rank.budget=1", *GRID[2:], "--output-dir", mine, "--overwrite").code == 0
    )
    same = [one == moment(mine / name) for name, one in zip(NAMES, before, strict=True)]
    assert same == [False, False, True, True], "those that are asked for, and no others"
    assert state_of(mine) == ["done"] * 2
