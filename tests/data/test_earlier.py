"""Rows of an earlier run, read again from its record: the same ones, or a refusal that names the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import CHATML, byte_tokenizer, task_named
from tiny_run import make_recipe, train, write_rows

from dynlora_cli.data.earlier import earlier_data, lineage, run_folder
from dynlora_cli.data.load import Data
from dynlora_cli.errors import UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.tokenizer import load_tokenizer
from dynlora_cli.training.setup import read_data

SHORT = ("train.max_steps=1", "eval.steps=null")


def tokens(data: Data) -> list[tuple[int, ...]]:
    return [tuple(example.input_ids) for example in (*data.train, *data.val)]


def again(folder: Path, base: Path, **settings: Any) -> Data:
    return earlier_data(folder, load_tokenizer(base), task_named(settings.pop("task", "causal-lm")), **settings)


def change(folder: Path, **keys: Any) -> None:
    path = folder / "dynlora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_rows_are_those_of_the_run(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, *SHORT)
    train(recipe)
    first = read_data(recipe, BaseFiles.find(recipe.model))
    found = again(tmp_path / "out", tmp_path / "llama", context=128)
    assert tokens(found) == tokens(first)
    assert (len(found.train), len(found.val)) == (32, 8)
    assert found.sha256 == first.sha256


def test_changed_rows_are_refused_by_name(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, *SHORT))
    write_rows(tmp_path / "llama.jsonl", 41)
    with pytest.raises(UsageError, match=r"rows of the run in .*out cannot be used again: .*changed"):
        again(tmp_path / "out", tmp_path / "llama")
    (tmp_path / "llama.jsonl").unlink()
    with pytest.raises(UsageError, match=r"rows of the run in .*out cannot be used again: .*no file") as caught:
        again(tmp_path / "out", tmp_path / "llama")
    assert "leave dataset.replay out" in str(caught.value.hint)


def test_another_tokenizer_or_task_is_named(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, *SHORT))
    other = byte_tokenizer()
    other.add_tokens(["count"])
    with pytest.raises(UsageError, match="the tokenizer is another one"):
        earlier_data(tmp_path / "out", other, task_named())
    with pytest.raises(UsageError, match="trained for causal-lm, and this is sequence-classification"):
        again(tmp_path / "out", tmp_path / "llama", task="sequence-classification")


def test_the_template_of_the_run_is_used_and_taken_off_again(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, *SHORT, f"dataset.chat_template={json.dumps(CHATML)}")
    train(recipe)
    tokenizer = load_tokenizer(tmp_path / "llama")
    tokenizer.chat_template = "{{ messages }}"  # of a recipe that came later
    found = earlier_data(tmp_path / "out", tokenizer, task_named())
    assert "<|im_start|>user" in tokenizer.decode(found.train[0].input_ids)
    assert tokenizer.chat_template == "{{ messages }}"


def test_the_model_s_own_template_where_a_later_recipe_has_set_another(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, *SHORT))
    tokenizer = load_tokenizer(tmp_path / "llama")
    tokenizer.chat_template = CHATML
    assert tokens(earlier_data(tmp_path / "out", tokenizer, task_named())) == tokens(
        again(tmp_path / "out", tmp_path / "llama")
    )


def test_adapters_without_known_rows_are_refused(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, *SHORT))
    change(tmp_path / "out", recipe=None)
    with pytest.raises(UsageError, match="holds no recipe"):
        again(tmp_path / "out", tmp_path / "llama")
    (tmp_path / "out" / "dynlora.json").unlink()
    with pytest.raises(UsageError, match=r"nobody knows the rows .* another tool"):
        again(tmp_path / "out", tmp_path / "llama")
    with pytest.raises(UsageError, match="there is no folder"):
        lineage(tmp_path / "nowhere")


def record(folder: Path, sha256: str | None, *before: tuple[Path, str | None]) -> Path:
    """A run's folder with a record that says what it came from."""
    folder.mkdir()
    births = [
        {"run": path.name, "name": path.name, "date": None, "data_sha256": sha, "folder": str(path), "old": None}
        for path, sha in (*before, (folder, sha256))
    ]
    (folder / "dynlora.json").write_text(json.dumps({"data": {"sha256": sha256}, "births": births}))
    return folder


def test_a_lineage_is_told_oldest_first_and_follows_moved_folders(tmp_path: Path) -> None:
    first = record(tmp_path / "v1", "a")
    foreign = (tmp_path / "theirs", None)
    second = record(tmp_path / "v2", "b", foreign, (first, "a"))
    third = record(tmp_path / "v3", "c", foreign, (first, "a"), (second, "b"))
    assert lineage(first) == [first]
    assert lineage(third) == [first, second, third]
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert lineage(moved / "v3") == [moved / "v1", moved / "v2", moved / "v3"]


def test_a_lineage_with_a_gap_is_refused(tmp_path: Path) -> None:
    first = record(tmp_path / "v1", "a")
    second = record(tmp_path / "v2", "b", (first, "a"))
    change(first, data={"sha256": "z"})
    with pytest.raises(UsageError, match="v1, and another run is there now"):
        lineage(second)
    (first / "dynlora.json").unlink()
    with pytest.raises(UsageError, match="v1, and it is not there"):
        lineage(second)


def test_a_run_may_be_named_by_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "out" / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    assert run_folder(checkpoint) == (tmp_path / "out").resolve()
    assert run_folder(tmp_path / "out") == tmp_path / "out"
