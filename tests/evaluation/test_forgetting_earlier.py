"""Without `eval.also`, what a run may forget is what the runs before it held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from also_helpers import loss_in_double, sums
from cli_helpers import Answer
from eval_helpers import by_peft, foreign
from tiny_run import make_recipe, train
from transformers import AutoTokenizer

from dynlora_cli.config.recipe import Recipe
from dynlora_cli.evaluation.also import _earlier_runs
from dynlora_cli.runs.folder import read_record


def version(folder: Path, name: str, *overrides: str, before: str = "", kind: str = "llama") -> Recipe:
    """A run on words into `folder`/`name`, which goes on from the run `before`."""
    origin = [f"adapter.from={folder / before}"] if before else []
    return make_recipe(folder, *origin, "train.learning_rate=2e-2", *overrides, out=name, kind=kind)


def on_sums(folder: Path) -> list[str]:
    """Settings of a run that learns 32 sums and holds out 8."""
    for name, rows in (
        ("sums", sums(folder / "all.jsonl", 40)[:32]),
        ("held_out", sums(folder / "all.jsonl", 40)[32:]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"dataset.train=[{folder / 'sums.jsonl'}]", f"dataset.val=[{folder / 'held_out.jsonl'}]"]


def two_versions(folder: Path, steps: int) -> Path:
    """v1 learns sums, and v2 goes on from it with words."""
    train(version(folder, "v1", *on_sums(folder), f"train.max_steps={steps}"))
    train(version(folder, "v2", f"train.max_steps={steps}", before="v1"))
    return folder / "v2"


def test_runs_of_one_name_are_all_measured(tmp_path: Path):
    births, folders = [], [tmp_path / each / "out/v" for each in "abc"]
    for folder in folders:
        folder.mkdir(parents=True)
        births.append(
            {"run": str(folder), "name": "v", "date": None, "data_sha256": "1", "folder": str(folder), "old": None}
        )
        record = {"run_id": str(folder), "name": "v", "data": {"sha256": "1"}, "births": births}
        (folder / "dynlora.json").write_text(json.dumps(record))
    origin = SimpleNamespace(
        adapter=SimpleNamespace(origin=None), dataset=SimpleNamespace(replay=SimpleNamespace(origin=folders[2]))
    )
    found = _earlier_runs(origin, {})
    assert list(found.values()) == folders
    assert list(found) == ["v", "out/v", str(folders[2])]


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return two_versions(tmp_path_factory.mktemp("versions"), 40)


def test_a_slice_of_what_the_earlier_run_held_out(v2: Path, dynlora_eval: Callable[..., Answer]):
    folder = v2.parent
    summary, first = read_record(v2)["summary"], read_record(folder / "v1")["summary"]
    assert list(summary["also"]) == ["v1"]
    found = summary["also"]["v1"]
    assert found["rows"] == read_record(folder / "v1")["data"]["val_rows"] == 8
    # The run begins where v1 ended, and forgets sums as it learns words.
    assert found["before"] == pytest.approx(first["loss_after"], rel=1e-4)
    assert found["forgetting"] > 0.1
    answer = dynlora_eval("--adapter", v2, "--generate", 0, "--fail-above", "forgetting=0.1", "--json")
    assert answer.code == 4, answer.err
    again = answer.json["adapters"][0]["also"]["v1"]
    assert again["sha256"] == found["sha256"]
    assert again["after"] == pytest.approx(found["after"], rel=1e-5)
    assert "forgetting on v1 is" in answer.json["error"]


def test_the_whole_lineage(v2: Path):
    folder = v2.parent
    summary, _ = train(version(folder, "v3", "seed=3", before="v2"))
    assert list(summary["also"]) == ["v1", "v2"]
    assert summary["forgetting"] == max(one["forgetting"] for one in summary["also"].values())


def test_an_empty_list_switches_it_off(v2: Path):
    summary, _ = train(version(v2.parent, "none", "eval.also=[]", before="v2"))
    assert summary["also"] == {}


def test_an_earlier_run_whose_rows_have_changed_is_left_out(tmp_path: Path):
    folder = two_versions(tmp_path, 2).parent
    sums(folder / "sums.jsonl", 30)
    summary, (start, *_) = train(version(folder, "v3", before="v2"))
    assert list(summary["also"]) == ["v2"]
    (note,) = [note for note in start["notes"] if "forgetting on v1 is not measured" in note]
    assert "have changed" in note


def test_an_earlier_run_that_is_gone_is_left_out(tmp_path: Path):
    folder = two_versions(tmp_path, 2).parent
    (folder / "v1").rename(folder / "elsewhere")
    summary, (start, *_) = train(version(folder, "v3", before="v2"))
    assert list(summary["also"]) == ["v2"]
    (note,) = [note for note in start["notes"] if "forgetting on v1 is not measured" in note]
    assert "it is not there" in note


def test_an_adapter_of_another_tool_has_no_rows(tmp_path: Path):
    version(tmp_path, "none")  # makes the model
    foreign(tmp_path / "llama", tmp_path / "theirs")
    summary, (start, *_) = train(version(tmp_path, "v2", before="theirs"))
    assert summary["also"] == {}
    (note,) = [note for note in start["notes"] if "forgetting on theirs is not measured" in note]
    assert "another tool" in note


@pytest.mark.slow
def test_rows_of_an_earlier_run_that_are_trained_on_now_are_counted(tmp_path: Path):
    train(version(tmp_path, "v1"))
    _, (start, *_) = train(version(tmp_path, "v2", "seed=5", before="v1"))
    assert any(note.startswith("v1: ") and "also trained on" in note for note in start["notes"])


def test_the_number_is_that_of_peft_in_fp64(v2: Path):
    folder = v2.parent
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(v2)
    versions = [by_peft(folder / "llama", folder / name) for name in ("v1", "v2")]
    before, after = (loss_in_double(model, tokenizer, rows) for model in versions)
    found = read_record(v2)["summary"]["also"]["v1"]
    assert found["before"] == pytest.approx(before, abs=1e-5)
    assert found["after"] == pytest.approx(after, abs=1e-5)
    assert found["forgetting"] == pytest.approx(after - before, abs=2e-5)


def test_a_run_that_only_replays_rows_is_measured_on_what_was_held_out(v2: Path):
    folder = v2.parent
    replay = json.dumps({"from": str(folder / "v1"), "share": 0.2})
    summary, _ = train(version(folder, "replayed", f"dataset.replay={replay}"))
    assert list(summary["also"]) == ["v1"]
    # Without adapter.from the base is what it begins with.
    assert summary["also"]["v1"]["before"] == pytest.approx(
        read_record(folder / "v1")["summary"]["loss_before"], rel=1e-5
    )
    assert summary["forgetting"] < 0


def test_a_run_that_replays_the_rows_of_its_own_adapter_has_each_set_once(v2: Path):
    folder = v2.parent
    summary, _ = train(version(folder, "again", 'dataset.replay={"share": 0.2}', before="v2"))
    assert list(summary["also"]) == ["v1", "v2"]
