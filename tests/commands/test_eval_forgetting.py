"""`dynlora eval` on rows of other kinds: an adapter's own sets once more, sets that are named, thresholds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from also_helpers import loss_in_double, sums, with_also
from cli_helpers import Answer
from eval_helpers import Run, by_peft, foreign
from numeric import same_loss
from tiny_run import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.runs.folder import RECORD

Eval = Callable[..., Answer]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the set `sums`; not to be changed."""
    folder = tmp_path_factory.mktemp("also")
    summary, _ = train(with_also(folder))
    return Run(folder / "out", folder / "llama.yaml", summary)


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    return shutil.copytree(trained.folder, tmp_path / "copied")


def test_its_own_sets_are_measured_again(trained: Run, dynlora_eval: Eval):
    answer = dynlora_eval("--adapter", trained.folder, "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    (adapter,) = answer.json["adapters"]
    found, told = adapter["also"]["sums"], trained.summary["also"]["sums"]
    assert found.pop("to") == "before training"
    assert found["before"] == told["before"]
    assert found["after"] == same_loss(told["after"])
    assert {key: found[key] for key in ("rows", "targets", "sha256")} == {
        key: told[key] for key in ("rows", "targets", "sha256")
    }
    assert adapter["forgetting"] == found["forgetting"] == found["after"] - found["before"]
    assert f"{found['forgetting']:+.4f}   before training" in answer.err


def test_named_sets_are_compared_with_the_base(trained: Run, tmp_path: Path, dynlora_eval: Eval):
    rows, base = sums(tmp_path / "other.jsonl", 9), trained.folder.parent / "llama"
    adapter = foreign(base, tmp_path / "foreign")
    answer = dynlora_eval("--adapter", adapter, "--data", tmp_path / "other.jsonl", "--generate", 0,
                          "--also", f"other={tmp_path / 'other.jsonl'}", "--base", base, "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    found = answer.json["adapters"][0]["also"]["other"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = loss_in_double(AutoModelForCausalLM.from_pretrained(base), tokenizer, rows)
    after = loss_in_double(by_peft(base, adapter), tokenizer, rows)
    assert found["to"] == "base"
    assert found["before"] == pytest.approx(before, abs=2e-6)
    assert found["after"] == pytest.approx(after, abs=2e-6)
    assert abs(found["forgetting"] - (after - before)) < 4e-6
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("forgetting=9", 0),
        ("forgetting=-9", 4),
        ("forgetting:sums=-9", 4),
        ("loss=100", 0),
        ("loss=0.5", 4),
        ("100", 0),
    ],
)
def test_a_limit(limit: str, code: int, trained: Run, dynlora_eval: Eval):
    answer = dynlora_eval("--adapter", trained.folder, "--generate", 0, "--fail-above", limit, "--json")
    assert answer.code == code, answer.err
    report = answer.json
    assert report["ok"] is (code == 0)
    if code and limit.startswith("forgetting"):
        amount = report["adapters"][0]["forgetting"]
        assert report["failed"] == [f"out: forgetting on sums is {amount:.4f}, above --fail-above {limit}"]


def test_several_limits_at_once(trained: Run, dynlora_eval: Eval):
    limits = ("--fail-above", "0.5", "--fail-above", "forgetting=-9")
    answer = dynlora_eval("--adapter", trained.folder, "--generate", 0, *limits, "--json")
    assert answer.code == 4
    assert len(answer.json["failed"]) == 2


def test_a_limit_on_what_is_not_measured(trained: Run, llama: Run, dynlora_eval: Eval):
    answer = dynlora_eval("--adapter", llama.folder, "--generate", 0, "--fail-above", "forgetting=0.1", "--json")
    assert answer.code == 2
    assert "--fail-above forgetting: not measured for out, which has no rows of other kinds" in answer.json["error"]
    assert "--also NAME=FILE" in answer.json["hint"]
    answer = dynlora_eval("--adapter", trained.folder, "--generate", 0, "--fail-above", "forgetting:law=1", "--json")
    assert answer.code == 2
    assert "--fail-above forgetting:law: not measured for out, which has the sets sums" in answer.json["error"]


def test_rows_that_are_gone_or_others(trained: Run, copied: Path, dynlora_eval: Eval):
    record = json.loads((copied / RECORD).read_text())
    (also,) = record["recipe"]["eval"]["also"]
    for rows, said in ((None, "no file or folder"), (5, "its rows are others than in training")):
        also["path"] = str(copied / "moved.jsonl")
        if rows:
            sums(copied / "moved.jsonl", rows)
        (copied / RECORD).write_text(json.dumps(record))
        answer = dynlora_eval("--adapter", copied, "--generate", 0, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["adapters"][0]["also"] == {}
        (note,) = [note for note in answer.json["notes"] if "forgetting" in note]
        assert note.startswith("out: forgetting on sums is not measured: ")
        assert said in note
        gate = dynlora_eval("--adapter", copied, "--generate", 0, "--fail-above", "forgetting=1")
        assert gate.code == 2
        assert "sums is left out: " in gate.err
        assert said in " ".join(gate.err.split())


def test_a_pruned_adapter_is_compared_with_what_was_before_training(
    trained: Run, tmp_path: Path, dynlora_eval: Eval, dynlora: Eval
):
    pruned = dynlora(
        "prune", "--adapter", trained.folder, "--budget", "0.5", "--out", tmp_path / "small", "--no-measure"
    )
    assert pruned.code == 0, pruned.err
    answer = dynlora_eval("--adapter", tmp_path / "small", "--generate", 0, "--json")
    found = answer.json["adapters"][0]["also"]["sums"]
    assert found["before"] == trained.summary["also"]["sums"]["before"]
    assert found["after"] != trained.summary["also"]["sums"]["after"]


def test_a_damaged_record(copied: Path, dynlora_eval: Eval):
    record = json.loads((copied / RECORD).read_text())
    record["summary"]["also"]["sums"]["before"] = "much"
    (copied / RECORD).write_text(json.dumps(record))
    answer = dynlora_eval("--adapter", copied, "--json")
    assert answer.code == 2
    assert "also.sums.before" in answer.json["error"]


def test_a_classifier_whose_base_has_no_head(runs: Callable[[str], Run], dynlora_eval: Eval):
    run = runs("bert")
    rows = run.folder.parent / "bert.jsonl"
    answer = dynlora_eval("--adapter", run.folder, "--also", f"same={rows}", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["adapters"][0]["also"] == {}
    assert "no classifier head" in answer.err
    answer = dynlora_eval("--adapter", run.folder, "--also", f"same={rows}", "--fail-above", "forgetting=1", "--json")
    assert answer.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--also", "law"], "must be written NAME=FILE"),
        (["--also", "law=nowhere.jsonl"], "--also law: no file or folder nowhere.jsonl"),
        (["--also", "a=x.jsonl", "--also", "a=y.jsonl"], "two sets are called a"),
        (["--also", "a=x.jsonl", "--no-base"], "--no-base"),
        (["--fail-above", "forgeting=1"], "it limits loss or forgetting, not 'forgeting'"),
    ],
)
def test_mistakes(arguments: list[str], said: str, trained: Run, dynlora_eval: Eval):
    answer = dynlora_eval("--adapter", trained.folder, *arguments, "--json")
    assert answer.code == 2
    assert said in answer.json["error"]


def test_a_name_that_is_taken(trained: Run, tmp_path: Path, dynlora_eval: Eval):
    sums(tmp_path / "x.jsonl")
    answer = dynlora_eval("--adapter", trained.folder, "--also", f"sums={tmp_path / 'x.jsonl'}", "--json")
    assert answer.code == 2
    assert "has a set of that name from its training" in answer.json["error"]
