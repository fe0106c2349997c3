"""Descriptions of sources: read from a list or a file, and drawn for each row by the seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_run import make_recipe

from dynlora_cli.commands import preflight
from dynlora_cli.config.sections import TrainSource
from dynlora_cli.data.descriptions import read_descriptions
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.tasks import task as tasks

TEXTS = ["one", "two", "three"]


def data_of(folder: Path, *overrides: str, seed: int = 0) -> Data:
    recipe = make_recipe(folder, *overrides)
    task = tasks.of(recipe.model, recipe.train)
    return load_data(recipe.dataset, BaseFiles.find(recipe.model).tokenizer, task=task, seed=seed)


def drawn(data: Data) -> dict[int, str]:
    return {example.row: example.description for example in [*data.train, *data.val]}


def test_each_row_draws_one_by_the_seed_also_those_that_are_held_out(tmp_path: Path):
    texts = f"dataset.train.0.descriptions={TEXTS}"
    first, again, other = (drawn(data_of(tmp_path, texts, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    counts = Counter(first.values())
    assert set(counts) == set(TEXTS)
    assert min(counts.values()) >= 5, "of 40 rows"


def test_they_are_part_of_what_a_run_is_known_by(tmp_path: Path):
    plain = data_of(tmp_path)
    texts = [data_of(tmp_path, f"dataset.train.0.descriptions={part}") for part in (TEXTS, ["one"])]
    assert len({data.sha256 for data in (plain, *texts)}) == 3
    assert set(drawn(plain).values()) == {""}


def test_rows_to_measure_on_have_those_of_their_own_source(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    val = f"dataset.val=[{{path: {recipe.dataset.train[0].path}, descriptions: [held out]}}]"
    data = data_of(tmp_path, f"dataset.train.0.descriptions={TEXTS}", val)
    assert {example.description for example in data.val} == {"held out"}
    assert {example.description for example in data.train} == set(TEXTS)


def test_a_file_has_one_on_a_line(tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("\ufeff one \n\n two\n", encoding="utf-8")
    assert read_descriptions(TrainSource(path="x", descriptions=str(path))) == ["one", "two"]
    assert read_descriptions(TrainSource(path="x")) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\ntwo\n one\n", "texts.txt:3: 'one' stands on line 1 already"),
        (b"\n \n", "holds no description"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as found:
        read_descriptions(TrainSource(path="x", descriptions=str(path)))
    assert words in found.value.message


def test_a_missing_file_is_found_before_torch_is_loaded(tmp_path: Path):
    recipe = make_recipe(tmp_path, "dataset.train.0.descriptions=Add numbers.")
    with pytest.raises(UsageError, match=r"there is no file Add numbers\.") as found:
        preflight.training(recipe, writes=False)
    assert "a text stands in a list: descriptions: ['Add numbers.']" in str(found.value.hint)
    folder = make_recipe(tmp_path, f"dataset.train.0.descriptions={tmp_path}")
    with pytest.raises(UsageError, match="cannot read"):
        preflight.training(folder, writes=False)
