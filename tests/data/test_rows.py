"""What files and hub data sets do to rows: nulls that Arrow fills in, classes, halves of characters, scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import CHATML, byte_tokenizer, dataset, source, task_named

from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import DataError

CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name }}!{{ c.arguments | tojson }}{% endfor %}",
)


def load(*train: Any, task: str = "causal-lm", tokenizer: Any = None) -> Data:
    return load_data(dataset(*train), tokenizer or byte_tokenizer(), task=task_named(task), seed=0)


def lines(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def on_the_hub(monkeypatch: pytest.MonkeyPatch, stored: Any) -> Any:
    """A source whose hub data set is this."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: stored)
    return source("owner/set")


# -- nulls that Arrow fills in -----------------------------------------------------------------------------------------


def call(**arguments: Any) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "the cat"}]
    turns.append({"role": "assistant", "content": "", "tool_calls": [{"name": "do", "arguments": arguments}]})
    tools = [{"name": "do", "parameters": {name: {"type": "string"} for name in arguments}}]
    return {"messages": turns, "tools": tools, "note": None}


ROWS = [call(place="mat"), call(time=["now", "then"])]


def rows_of(where: Any) -> list[dict[str, Any]]:
    (table,) = tables(where, [], held_out=False)
    return [row for _, row in table.read()]


def test_parquet_invents_no_arguments_and_no_parameters_of_tools(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert rows_of(source(path)) == ROWS
    tokenizer = byte_tokenizer(CALLS)
    text = tokenizer.decode(load(source(path), tokenizer=tokenizer).train[0].input_ids)
    assert 'do!{"place": "mat"}<' in text


def test_a_hub_set_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = datasets.Dataset(pyarrow.Table.from_pylist(ROWS))
    assert None in stored[0]["messages"][1]["tool_calls"][0]["arguments"].values()
    assert rows_of(on_the_hub(monkeypatch, stored)) == ROWS


def test_a_null_that_somebody_wrote_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = call(place=None)
    assert rows_of(source(lines(tmp_path / "a.jsonl", json.dumps(row)))) == [row]
    if hasattr(datasets, "Json"):
        features = datasets.Features({"messages": datasets.List(datasets.Json())})
        stored = datasets.Dataset.from_dict({"messages": [row["messages"]]}, features=features)
        assert rows_of(on_the_hub(monkeypatch, stored)) == [{"messages": row["messages"]}]


# -- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        r'{"text": "a \ud83d"}',
        r'{"prompt": "a", "completion": "\ude00 b"}',
        r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}',
        r'{"messages": [{"role": "user", "content": "a", "more": [{"\ud83d": 1}]}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_half_a_character_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    whole = row.replace(r"\ud83d", r"\ud83d\ude00").replace(r"\ude00 ", "")
    path = lines(tmp_path / "a.jsonl", whole, row)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a text holds half a character, '\\ud(83d|e00)'"):
        load(path, tokenizer=byte_tokenizer(CHATML))
    assert load(lines(path, whole), tokenizer=byte_tokenizer(CHATML)).counts["train"]["rows"] == 1


def test_a_row_without_a_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    stored = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, None]}, features=features)
    with pytest.raises(DataError, match="owner/set, row 2: column 'label' is missing, null or empty"):
        load(on_the_hub(monkeypatch, stored), task="sequence-classification")


def test_a_hub_set_with_a_script_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any, split: str) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="dataset owner/set: it is read by a Python script") as caught:
        load(source("owner/set"))
    assert caught.value.hint is not None
    assert "refs/convert/parquet" in caught.value.hint


def test_empty_texts_of_a_classifier_are_dropped_where_its_tokenizer_adds_nothing(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    rows = [{"text": text, "label": label} for text, label in (("the cat", 0), ("", 1), ("a fox", 1))]
    path = lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    data = load(path, task="sequence-classification", tokenizer=tokenizer)
    assert [example.row for example in data.train] == [0, 2]
    assert data.counts["train"]["dropped"] == 1
    assert any("1 row dropped: 1 row with an empty text or answer" in note for note in data.notes)
