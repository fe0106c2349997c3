"""`dynlora init` writes a recipe that fits the rows; `dynlora doctor` finds what is broken."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora

import dynlora_cli
from dynlora_cli.config.load import load_recipe

ROWS = {
    "completion": [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}],
    "chat": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2,
    "classification": [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}],
    "text": [{"text": "once upon a time"}, {"text": "there was"}],
    "alpaca": [{"instruction": "say", "input": "", "output": "no"}] * 2,
}
TINY = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_arguments_it_is_a_recipe_that_trains(dynlora: Dynlora):
    answer = dynlora("init")
    assert answer.code == 0
    assert "dynlora train recipe.yaml --dry-run" in answer.err
    small = ("--set", "train.max_steps=2", "--set", "train.learning_rate=1e-3", "--set", "dataset.max_length=64")
    assert dynlora("train", "recipe.yaml", *small).code == 0
    assert Path("out/recipe/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("form", ROWS)
def test_the_rows_decide(form: str, dynlora: Dynlora):
    write_rows("rows.jsonl", ROWS[form])
    answer = dynlora("init", "rows.jsonl", "--out", "mine/my.yaml", "--json")
    assert answer.code == 0
    assert (answer.json["format"], answer.json["rows"]) == (form, len(ROWS[form]))
    recipe = load_recipe(Path("mine/my.yaml"))
    assert recipe.model.task == ("sequence-classification" if form == "classification" else "causal-lm")
    assert (recipe.dataset.train[0].path, recipe.output_dir) == ("rows.jsonl", "out/my")


def base_without_template() -> str:
    shutil.copytree(TINY, "base", ignore=shutil.ignore_patterns("*.jinja"))
    return "base"


@pytest.mark.slow
def test_columns_of_other_names(dynlora: Dynlora):
    write_rows("rows.jsonl", [{"question: long": "1 + 1 =", "it": "2"}] * 30)
    refused = dynlora("init", "rows.jsonl")
    assert (refused.code, list(Path().iterdir())) == (2, [Path("rows.jsonl")])
    assert "rows.jsonl:1: the columns it, question: long fit no format" in refused.err
    assert "--columns 'prompt=question: long,completion=it'" in refused.err
    assert dynlora("init", "rows.jsonl", "--columns", "prompt=question: long, completion=it").code == 0
    assert load_recipe(Path("recipe.yaml")).dataset.train[0].columns == {"prompt": "question: long", "completion": "it"}
    assert "1 + 1 =" in dynlora("train", "recipe.yaml", "--dry-run").err


KNOWN = {
    "question answer": ("completion", {"prompt": "question", "completion": "answer"}),
    "Question Answer": ("completion", {"prompt": "Question", "completion": "Answer"}),
    "query response": ("completion", {"prompt": "query", "completion": "response"}),
    "input output": ("completion", {"prompt": "input", "completion": "output"}),
    "prompt response": ("completion", {"completion": "response"}),
    "answer problem solution": ("completion", {"prompt": "problem", "completion": "solution"}),
    "instruction response": ("alpaca", {"output": "response"}),
    "instruction context response": ("alpaca", {"output": "response", "input": "context"}),
    "context question answer": ("alpaca", {"instruction": "question", "output": "answer", "input": "context"}),
    "system query response": ("alpaca", {"instruction": "query", "output": "response"}),
    "content": ("text", {"text": "content"}),
    "label sentence1 sentence2": (
        "classification",
        {"text": "sentence1", "label": "label", "text_pair": "sentence2"},
    ),
    "review sentiment": ("classification", {"text": "review", "label": "sentiment"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("names", KNOWN)
def test_names_that_others_use_are_known_and_said(names: str, dynlora: Dynlora):
    form, columns = KNOWN[names]
    write_rows("rows.jsonl", [{name: f"{name} {number}" for name in names.split()} for number in range(4)])
    answer = dynlora("init", "rows.jsonl", "--json")
    assert (answer.code, answer.json["format"], answer.json["columns"]) == (0, form, columns), answer.err
    assert "columns known by their names" in answer.err
    assert load_recipe(Path("recipe.yaml")).dataset.train[0].columns == columns
    assert dynlora("train", "recipe.yaml", "--dry-run").code == 0


QUESTION = {"prompt": "1 + 1 =", "completion": "2"}
BAD = {
    "a truth value": ([QUESTION, QUESTION | {"completion": True}], "rows.jsonl:2: column 'completion' is of type bool"),
    "a missing column": ([QUESTION, {"prompt": "2"}], "rows.jsonl:2: column 'completion' is missing"),
    "a missing column of another name": ([{"question": "a", "answer": "b"}, {"question": "c"}], "no column 'answer'"),
    "a weight": ([QUESTION, QUESTION | {"weight": 0.5}], "column 'weight' (0.5 here) weighs rows"),
    "half a pair": ([{"prompt": "a", "chosen": "b"}] * 2, "is one of a preference pair"),
    "one row": ([QUESTION], "one row is all there is"),
    "one class": ([{"text": "a", "label": "b"}, {"text": "c", "label": "b"}], "a classifier needs two classes"),
    "a message without a role": ([{"messages": [{"content": "a"}]}] * 2, "message 1 has no role"),
    "no text": ([{"a": 1, "b": 2}] * 2, "none of them holds a text"),
    "two texts": ([{"a": "x", "b": "y"}] * 2, "--columns prompt=a,completion=b"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_train_refuses_is_refused_here(case: str, dynlora: Dynlora):
    rows, message = BAD[case]
    write_rows("rows.jsonl", rows)
    answer = dynlora("init", "rows.jsonl")
    assert (answer.code, Path("recipe.yaml").exists()) == (2, False)
    assert message in answer.err


def test_what_is_not_read_is_named(dynlora: Dynlora):
    write_rows("rows.jsonl", [QUESTION | {"topic": "sums"}, QUESTION])
    assert "columns that are not read: topic" in dynlora("init", "rows.jsonl").err


@pytest.mark.slow
def test_bare_text_that_would_run_together_gets_a_newline_between(dynlora: Dynlora):
    rows = [{"question": f"{number} + 1 =", "answer": f"{number + 1}"} for number in range(30)]
    write_rows("rows.jsonl", rows)
    assert dynlora("init", "rows.jsonl").code == 0
    assert load_recipe(Path("recipe.yaml")).dataset.separator == "", "the built-in model makes turns of them"
    answer = dynlora("init", "rows.jsonl", "--model", base_without_template(), "--overwrite")
    assert "would run together" in answer.err
    assert load_recipe(Path("recipe.yaml")).dataset.separator == "\n"
    tried = dynlora("train", "recipe.yaml", "--dry-run")
    assert (tried.code, "nothing between the two" in tried.err) == (0, False)


@pytest.mark.parametrize("row", [{"prompt": "1 =\n", "completion": "2"}, {"prompt": "1 =", "completion": " 2"}])
def test_bare_text_that_does_not_run_together_is_left_as_it_is(row: dict[str, str], dynlora: Dynlora):
    write_rows("rows.jsonl", [row] * 3)
    assert dynlora("init", "rows.jsonl", "--model", base_without_template()).code == 0
    assert "separator" not in Path("recipe.yaml").read_text()


def test_conversations_need_a_base_with_a_template(dynlora: Dynlora):
    write_rows("rows.jsonl", ROWS["chat"])
    answer = dynlora("init", "rows.jsonl", "--model", base_without_template())
    assert (answer.code, Path("recipe.yaml").exists()) == (2, False)
    assert "conversations need a chat template" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "val", "test"),
    [
        ("train.jsonl", "valid.jsonl", "test.jsonl"),
        ("sums.jsonl", "sums-dev.jsonl", "sums_test.jsonl"),
        ("d/train.jsonl", "d/validation.jsonl", "d/test.jsonl"),
        ("d", "d/validation.jsonl", "d/test.jsonl"),
    ],
)
def test_files_of_other_splits_go_where_they_belong(data: str, val: str, test: str, dynlora: Dynlora):
    for name in ("d/train.jsonl" if data == "d" else data, val, test, "other_valid.jsonl"):
        write_rows(name, [{"question": f"{name} {number}", "answer": f"{number}"} for number in range(4)])
    answer = dynlora("init", data, "--json")
    assert (answer.code, answer.json["val"], answer.json["test"], answer.json["rows"]) == (0, [val], [test], 4)
    dataset = load_recipe(Path("recipe.yaml")).dataset
    assert [(source.path, source.columns) for source in dataset.val] == [(val, dataset.train[0].columns)]
    assert f"--data {test}" in Path("recipe.yaml").read_text()
    tried = dynlora("train", "recipe.yaml", "--dry-run")
    assert tried.code == 0


def test_a_file_of_another_split_that_does_not_fit_is_named(dynlora: Dynlora):
    write_rows("train.jsonl", [QUESTION] * 3)
    write_rows("valid.jsonl", [{"text": "once"}])
    answer = dynlora("init", "train.jsonl", "--json")
    assert (answer.code, answer.json["val"]) == (0, [])
    assert "valid.jsonl is left aside: valid.jsonl:1: its columns are not those of completion rows" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("signs", [256, 1000, 20000])
def test_a_short_text_is_cut_into_several_pieces(signs: int, dynlora: Dynlora):
    Path("a.txt").write_text(("Once upon a time there was a fox. " * 1000)[:signs])
    assert dynlora("init", "a.txt").code == 0
    assert load_recipe(Path("recipe.yaml")).dataset.max_length == {256: 16, 1000: 32, 20000: 1024}[signs]
    assert dynlora("train", "recipe.yaml", "--dry-run").code == 0
    Path("a.txt").write_text("Once upon a time")
    assert "16 characters of text are too few" in dynlora("init", "a.txt", "--overwrite").err


@pytest.mark.slow
@pytest.mark.parametrize("form", ROWS)
def test_the_smallest_rows_pass_a_dry_run(form: str, dynlora: Dynlora):
    write_rows("rows.jsonl", ROWS[form])
    assert dynlora("init", "rows.jsonl").code == 0
    assert dynlora("train", "recipe.yaml", "--dry-run").code == 0


@pytest.mark.parametrize("name", ["my rows.jsonl", "a#b: 'c'.jsonl", "007.jsonl", "größe \u2028.jsonl", "no.jsonl"])
def test_any_name_of_a_file_is_written_so_that_it_is_read_back(name: str, dynlora: Dynlora):
    write_rows(name, ROWS["completion"])
    assert dynlora("init", name).code == 0
    assert load_recipe(Path("recipe.yaml")).dataset.train[0].path == name


def test_a_recipe_is_not_overwritten_unasked(dynlora: Dynlora):
    Path("recipe.yaml").write_text("model: mine\n")
    assert dynlora("init").code == 2
    assert Path("recipe.yaml").read_text() == "model: mine\n"
    assert dynlora("init", "--overwrite").code == 0
    assert "builtin:tiny" in Path("recipe.yaml").read_text()


def test_a_folder_whose_files_differ_is_not_guessed_at(dynlora: Dynlora):
    write_rows("d/a.jsonl", ROWS["completion"])
    assert dynlora("init", "d").code == 0
    write_rows("d/b.jsonl", ROWS["chat"])
    answer = dynlora("init", "d", "--overwrite")
    assert answer.code == 2
    assert "its files hold rows of different kinds" in answer.err


def test_the_rows_of_all_files_are_counted(dynlora: Dynlora):
    for name in ("a", "b", "c"):
        write_rows(f"d/{name}.jsonl", ROWS["completion"] * 4)
    answer = dynlora("init", "d", "--json")
    assert (answer.code, answer.json["format"], answer.json["rows"]) == (0, "completion", 24), answer.err


def test_a_hub_data_set_is_named_without_a_look(dynlora: Dynlora):
    answer = dynlora("init", "someone/something", "--model", "other/model", "--json")
    assert (answer.code, answer.json["rows"]) == (0, None)
    assert "not looked at" in answer.err
    recipe = load_recipe(Path("recipe.yaml"))
    assert (recipe.dataset.train[0].path, recipe.model.name_or_path) == ("someone/something", "other/model")


WRONG = {
    "no such file": (["rows.jsonl"], "no file or folder rows.jsonl"),
    "no data": ([""], "DATA is empty"),
    "no model": (["--model", ""], "--model is empty"),
    "no such model": (["--model", "builtin:huge"], "no built-in model 'builtin:huge'"),
    "a folder without a model": (["--model", "."], "holds no config.json"),
    "columns of no form": (["--columns", "prompt"], "'prompt' is not OURS=THEIRS"),
    "another name": (["--out", "recipe.txt"], "a recipe's name ends in .yaml"),
    "an unknown column": (["--columns", "prompt=question"], "has no 'question'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_and_nothing_is_left(case: str, dynlora: Dynlora):
    arguments, message = WRONG[case]
    answer = dynlora("init", *arguments)
    assert (answer.code, list(Path().iterdir())) == (2, [])
    assert message in answer.err


# -- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing every extra takes long, and tests/cli/test_broken_extras.py does it."""
    monkeypatch.setattr("dynlora_cli.commands.doctor.try_imports", lambda modules: [])


def findings(answer: Any) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in answer.json["findings"]}


def test_a_sound_machine(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    answer = dynlora("doctor", "--json")
    found = findings(answer)
    assert (answer.code, answer.json["ok"]) == (0, True)
    assert found["torch"]["found"] == metadata.version("torch")
    assert (found["4 bits on cpu"]["found"], found["OMP_NUM_THREADS"]["found"]) == ("works", "2")
    assert "no faults" in answer.err


def with_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    true = metadata.version

    def of(name: str) -> str:
        if name == package and version is None:
            raise metadata.PackageNotFoundError(name)
        return str(version) if name == package else true(name)

    monkeypatch.setattr(metadata, "version", of)


@pytest.mark.parametrize("version", ["4.57.1", "6.0", None])
def test_a_version_that_does_not_fit(version: str | None, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    with_version(monkeypatch, "transformers", version)
    answer = dynlora("doctor", "--json")
    assert (answer.code, answer.json["ok"]) == (3, False)
    assert findings(answer)["transformers"]["hint"] == 'pip install "transformers<6,>=5.0"'
    assert "fault: transformers: transformers<6,>=5.0 is needed" in answer.err


def test_something_optional_is_no_fault(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    answer = dynlora("doctor", "--json")
    assert answer.code == 0
    assert findings(answer)["gguf"]["hint"] == 'pip install "dynlora[gguf]"'


def test_something_optional_of_another_version_is_a_fault(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    with_version(monkeypatch, "gguf", "0.1")
    answer = dynlora("doctor", "--json")
    assert answer.code == 3
    assert findings(answer)["gguf"]["fault"] == "gguf 0.1 is installed, and gguf>=0.16 is needed"


def test_a_torch_that_cannot_be_imported(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answer = dynlora("doctor", "--json")
    assert answer.code == 3
    assert "force-reinstall torch" in findings(answer)["torch"]["hint"]


def test_a_psutil_that_cannot_be_imported(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    answer = dynlora("doctor", "--json")
    found = findings(answer)
    assert answer.code == 3
    assert found["cpu"]["found"].endswith(" cores, memory unknown")
    assert found["cpu"]["hint"] == "pip install --force-reinstall psutil"
    assert "current folder" in found, "the rest is looked at all the same"


def test_a_huggingface_hub_that_is_missing(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    """It is nobody's requirement by name: transformers brings it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    answer = dynlora("doctor", "--json")
    found = findings(answer)
    assert answer.code == 3
    assert found["models' cache"]["hint"] == "pip install --force-reinstall huggingface_hub"
    assert found["current folder"]["fault"] is None


def test_a_bitsandbytes_that_does_not_work(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "quantize_4bit", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    answer = dynlora("doctor", "--json")
    assert (answer.code, findings(answer)["4 bits on cpu"]["fault"]) == (3, "no kernel")


def test_a_gpu_that_torch_does_not_see(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A Card (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    answer = dynlora("doctor", "--json")
    assert answer.code == 3
    assert "this build of torch cannot use it" in findings(answer)["gpu"]["fault"]


def test_a_full_disk(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**6))
    answer = dynlora("doctor", "--json")
    assert (answer.code, findings(answer)["current folder"]["fault"]) == (3, "less than 2.1 GB free")


def test_from_its_source_there_is_no_record_to_compare_with(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    def unknown(_: str) -> None:
        raise metadata.PackageNotFoundError("dynlora")

    monkeypatch.setattr(metadata, "requires", unknown)
    assert dynlora("doctor").code == 0
