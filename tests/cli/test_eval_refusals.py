"""What `dynlora eval` refuses, with which exit code, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Answer
from eval_helpers import Run, foreign
from numeric import same_loss
from test_architecture import fresh
from tiny_run import model_folder

from dynlora_cli.evaluation import generation, held_out_loss, measure

GOLDEN = Path(__file__).parents[1] / "golden"


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run below ./out"),
        (["--fail-below", "acuracy=0.8"], "did you mean 'accuracy'"),
        (["--max-regression", "1%"], "--baseline"),
        (["--baseline", "none.json"], "none.json cannot be read"),
        (["--limit", "3"], "--tasks"),
        (["--tasks", "none.yaml"], "no task file none.yaml"),
        (["none.yaml"], "no recipe at none.yaml"),
        (["folder"], "--adapter folder"),
        (["--data", "none.yaml", "--adapter", "x"], "no recipe at none.yaml"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_before_anything_heavy_loads(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code, loaded, shown = fresh("eval", *arguments)
    assert (code, loaded) == (2, [])
    assert message in " ".join(shown.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_help(dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    """Golden: after a wanted change write the new text with UPDATE_GOLDEN=1."""
    monkeypatch.setenv("COLUMNS", "120")
    answer = dynlora_eval("--help")
    golden = GOLDEN / "help_eval.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(answer.out, encoding="utf-8")
    assert answer == (0, golden.read_text(encoding="utf-8"), "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--adapter", "nowhere"], 2, "nowhere does not exist"),
        (["--adapter", "{run}", "--adapter", "{run}"], 2, "are the same"),
        (["--adapter", "{run}", "--adapter", "{gpt2}"], 2, "different base models"),
        (["--adapter", "{run}", "--fail-below", "accuracy=0.8"], 2, "measured here: token_accuracy"),
        (["--adapter", "{bert}", "--fail-below", "bleu=10"], 2, "measured here: accuracy, f1, matthews"),
        (["--adapter", "{bert}", "--generate", "2"], 2, "no prompts"),
        (["--adapter", "{bert}", "--tasks", "hellaswag"], 2, "--tasks are for causal-lm"),
        (["--adapter", "{run}", "--data", "no.jsonl"], 2, "no.jsonl"),
        (["{recipe}", "--adapter", "{run}", "--data", "no.jsonl"], 2, "both say which rows"),
        (["{recipe}", "--base", "no-such-folder"], 3, "no-such-folder"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_gets_one_message(
    arguments: list[str], code: int, message: str, runs: Callable[[str], Run], dynlora_eval: Callable[..., Answer]
):
    places = {kind: runs(kind).folder for kind in ("gpt2", "bert")}
    places |= {"run": runs("llama").folder, "recipe": runs("llama").recipe}
    answer = dynlora_eval(*(argument.format(**places) for argument in arguments), "--json")
    assert answer.code == code, answer.err
    assert answer.json["ok"] is False
    assert message in " ".join(f"{answer.json['error']} {answer.json['hint']}".split())
    assert answer.err.count("error:") == 1


def copied(run: Run, folder: Path, **model: Any) -> Path:
    """A run as if it had been trained with other settings of its base."""
    shutil.copytree(run.folder, folder)
    record = json.loads((folder / "dynlora.json").read_text())
    record["recipe"]["model"] |= model
    (folder / "dynlora.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({}, {"load_in_4bit": True}, "model.load_in_4bit is false for the first and true for the second"),
        ({"load_in_8bit": True}, {}, "model.load_in_8bit is true for the first and false for the second"),
        ({}, {"dtype": "bfloat16"}, "model.dtype is float32 for the first and bfloat16 for the second"),
        (
            {"load_in_4bit": True},
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "model.bnb_4bit_quant_type is nf4 for the first and fp4 for the second",
        ),
    ],
    ids=str,
)
def test_one_base_that_was_stored_in_two_ways(
    one: dict[str, Any], other: dict[str, Any], message: str, llama: Run, dynlora_eval: Callable[..., Answer],
    tmp_path: Path,
):  # fmt: skip
    first, second = copied(llama, tmp_path / "one", **one), copied(llama, tmp_path / "other", **other)
    answer = dynlora_eval("--adapter", first, "--adapter", second, "--json")
    assert (answer.code, answer.json["error"].endswith(f": {message}")) == (2, True), answer.err
    assert "one by one" in answer.json["hint"]


def test_what_is_stored_alike_on_this_machine_compares(llama: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    """auto is float32 here, and what a 4-bit base would look like is of no account without one."""
    other = copied(llama, tmp_path / "other", dtype="float32", bnb_4bit_quant_type="fp4")
    answer = dynlora_eval("--adapter", llama.folder, "--adapter", other, "--generate", 0, "--json")
    assert answer.code == 0, answer.err


def test_rows_that_nobody_knows(dynlora_eval: Callable[..., Answer], tmp_path: Path):
    adapter = foreign(model_folder(tmp_path), tmp_path / "adapter", target_modules=["q_proj"])
    answer = dynlora_eval("--adapter", adapter)
    assert (answer.code, "--data FILE" in answer.err) == (2, True)


def test_weights_that_are_not_numbers(llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    honest = held_out_loss.row_sums

    def poisoned(*given: Any, **options: Any) -> Any:
        sums = honest(*given, **options)
        sums.loss_R[0] = math.nan
        return sums

    monkeypatch.setattr(measure, "row_sums", poisoned)
    answer = dynlora_eval("--adapter", llama.folder, "--json")
    assert (answer.code, answer.json["error"]) == (4, "the held-out loss of base is nan")


def test_without_the_extra(llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation, "missing_packages", lambda: ["sacrebleu"])
    answer = dynlora_eval("--adapter", llama.folder, "--json")
    assert answer.code == 0
    assert "bleu" not in answer.json["adapters"][0]
    assert 'pip install "dynlora[eval]"' in answer.err
    asked = dynlora_eval("--adapter", llama.folder, "--generate", 3, "--json")
    assert (asked.code, asked.json["hint"]) == (3, 'pip install "dynlora[eval]"')


def test_without_the_harness(llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    from dynlora_cli.evaluation import lm_eval

    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    answer = dynlora_eval("--adapter", llama.folder, "--tasks", "hellaswag", "--json")
    assert (answer.code, answer.json["hint"]) == (3, 'pip install "dynlora[harness]"')


def test_interrupted(llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    before = sorted(llama.folder.parent.rglob("*"))

    def ctrl_c(*given, **options):
        raise KeyboardInterrupt  # as Python does; a real signal is ignored where a shell started the tests with &

    monkeypatch.setattr(measure, "row_sums", ctrl_c)
    answer = dynlora_eval("--adapter", llama.folder, "--json")
    assert (answer.code, answer.json["ok"]) == (130, False)
    assert sorted(llama.folder.parent.rglob("*")) == before
    assert not list(tmp_path.iterdir())


# -- conversations ---------------------------------------------------------------------------------------------------


def test_another_chat_template_is_refused_unless_allowed(
    chat_run: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path
):
    answer = dynlora_eval("--adapter", chat_run.folder, "--samples", 2, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["adapters"][0]["loss"] == same_loss(chat_run.summary["loss_after"])
    assert answer.json["samples"][0]["references"][0].startswith("done ")
    changed = tmp_path / "changed"
    shutil.copytree(chat_run.folder, changed)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|bot|>"))
    refused = dynlora_eval("--adapter", changed, "--json")
    assert refused.code == 2
    assert "--allow-template-mismatch" in refused.json["hint"]
    assert refused.json["error"].count("hash") == 1
    allowed = dynlora_eval("--adapter", changed, "--allow-template-mismatch", "--generate", 0, "--json")
    assert allowed.code == 0
    assert any("chat template in use" in note for note in allowed.json["notes"])


def test_an_adapter_trained_without_a_template(chat_run: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(chat_run.folder, changed)
    record = json.loads((changed / "dynlora.json").read_text())
    record["chat_template_sha256"] = None
    (changed / "dynlora.json").write_text(json.dumps(record))
    answer = dynlora_eval("--adapter", changed, "--json")
    assert (answer.code, "trained without one" in answer.json["error"]) == (2, True)


def test_a_foreign_adapter_has_no_template_to_compare(
    chat_run: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path
):
    adapter = foreign(chat_run.folder.parent / "pico", tmp_path / "adapter", target_modules=["q_proj"])
    answer = dynlora_eval(
        "--adapter", adapter, "--data", chat_run.folder.parent / "chat.jsonl", "--generate", 0, "--json"
    )
    assert answer.code == 0, answer.err
    assert any("does not say which chat template" in note for note in answer.json["notes"])
