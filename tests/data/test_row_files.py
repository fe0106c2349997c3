"""What files of other people's making hold: read, or refused with file and row; nothing else."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from data_helpers import source

from dynlora_cli.data.formats.completion import to_example
from dynlora_cli.data.forms import BadRowError, Pair
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import DataError

PAIR = '{"prompt": "p ", "completion": "x"}\n'


def read(path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes."""
    notes: list[str] = []
    found = [row for table in tables(source(path, **settings), notes, held_out=False) for _, row in table.read()]
    return found, notes


# -- JSON ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", PAIR * 4 + '{"n": ' + "9" * 9000 + "}\n", r"a\.jsonl:5: JSON with a whole number of 9000 digits"),
        ("a.jsonl", PAIR + '{"n": ' + "[" * 3000 + "]" * 3000 + "}\n", r"a\.jsonl:2: JSON nested more than 200 deep"),
        ("a.jsonl", PAIR + '{"n": ' + "[" * 400 + "]" * 400 + "}\n", r"a\.jsonl:2: JSON nested more than 200 deep"),
        ("a.jsonl", PAIR + '{"n": 1, "n": 2}\n', r"a\.jsonl:2: JSON with the key 'n' twice in one object"),
        ("a.jsonl", PAIR + '{"n": {"m": 1, "m": 2}}\n', r"a\.jsonl:2: JSON with the key 'm' twice"),
        ("a.jsonl", PAIR + "\0" * 64, "a.jsonl: holds NUL characters"),
        ("a.json", '[\n{"n": 1},\n{"n": ' + "9" * 9000 + "}]", r"a\.json:3: JSON with a whole number of 9000 digits"),
        ("a.json", '[{"n": 1},\n{"n": ' + "[" * 400 + "]" * 400 + "}]", r"a\.json, row 2: JSON nested"),
        ("a.json", '[{"n": 1},\n{"n": 1, "n": 2}]', r"a\.json, row 2: JSON with the key 'n' twice"),
        ("a.json", "7", r"a\.json: expected a list of rows, found 7"),
        ("a.csv", "text,label,text\na,b,c\n", r"a\.csv:1: the column 'text' is there twice"),
        ("a.csv", "text\na\n" + "b" * 5000 + "\0\n", r"a\.csv:3: holds a NUL character"),
        ("a.txt", "a\n" * 4000 + "\0", r"a\.txt:4001: holds a NUL character"),
        ("a.jsonl.gz", "x", "unknown kind '.gz'"),
        ("a.arrow", "ARROW1 and no more", "not a valid Arrow file"),
        ("b.arrow", "x" * 99, "not a valid Arrow file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        read(tmp_path / name)


def test_brackets_in_texts_are_no_depth(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "[{" * 2000}) + "\n")
    assert read(tmp_path / "a.jsonl")[0] == [{"text": "[{" * 2000}]


# -- encodings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_a_mark_at_the_start_says_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    text = {"a.jsonl": '{"text": "é"}\n', "a.json": '[{"text": "é"}]', "a.csv": "text\né\n", "a.txt": "é"}[name]
    (tmp_path / name).write_text(text, encoding=encoding)
    rows, notes = read(tmp_path / name)
    assert rows == [{"text": "é"}]
    assert notes == [f"{tmp_path / name}: read as {encoding.upper()}, by the mark at its start"]


def test_what_is_no_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "cafe"}\n' * 9999 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:10000: not UTF-8 text"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_bytes("text\né\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"b\.csv: holds NUL characters, so it is no text in UTF-8"):
        read(tmp_path / "b.csv")


# -- CSV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.csv", 'prompt;completion\n"a;b";c, d\n', "semicolons"),
        ("a.csv", '"prompt";"completion"\n"a;b";"c, d"\n', "semicolons"),
        ("a.csv", "prompt\tcompletion\na;b\tc, d\n", "tabs"),
        ("a.tsv", 'prompt,completion\na;b,"c, d"\n', "commas"),
        ("a.csv", 'prompt,completion\na;b,"c, d"\n', None),
        ("a.csv", "sep=;\nprompt;completion\n'a;b';c, d\n".replace("'", '"'), None),
        ("A.CSV", 'prompt,completion\na;b,"c, d"\n', None),
    ],
)
def test_separators_are_recognised_and_said(tmp_path: Path, name: str, content: str, note: str | None) -> None:
    (tmp_path / name).write_text(content)
    rows, notes = read(tmp_path / name)
    assert rows == [{"prompt": "a;b", "completion": "c, d"}]
    said = f"{tmp_path / name}: its fields are separated by {note}, to judge by the header"
    assert notes == ([said] if note else [])


def test_lines_are_counted_after_a_line_that_names_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\na;b\n1\n")
    with pytest.raises(DataError, match=r"a\.csv:3: 1 fields, the header has 2"):
        read(tmp_path / "a.csv")


# -- Arrow ---------------------------------------------------------------------------------------------------------------


def test_times_that_python_has_none_for_are_no_text_and_harm_nobody(tmp_path: Path) -> None:
    far, fine = pyarrow.array([10**15], pyarrow.timestamp("s")), pyarrow.array([1], pyarrow.timestamp("ns"))
    table = pyarrow.table({"text": ["a"], "far": far, "fine": fine, "day": [date(2020, 1, 2)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    ((row,), _) = read(tmp_path / "a.parquet")
    assert (row["text"], row["day"]) == ("a", date(2020, 1, 2))
    assert not isinstance(row["far"], str)


def test_parquet_text_that_is_none(tmp_path: Path) -> None:
    broken = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'text' is not UTF-8 text"):
        read(tmp_path / "a.parquet")


def test_feather_is_read(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(pyarrow.table({"text": ["a", "b"]}), str(tmp_path / "a.feather"))
    assert read(tmp_path / "a.feather")[0] == [{"text": "a"}, {"text": "b"}]


# -- folders -------------------------------------------------------------------------------------------------------------


def test_a_saved_set_is_read_without_what_was_left_beside_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {n}", "completion": "x"} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "cache-1234.arrow").write_bytes((tmp_path / "data-00000-of-00002.arrow").read_bytes())
    found, notes = read(tmp_path)
    assert found == rows
    assert notes[0].endswith("left out: cache-1234.arrow, dataset_info.json, state.json")
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json: names 'data-00001-of-00002\.arrow', which is not beside it"):
        read(tmp_path)


def test_a_saved_dictionary_of_sets_is_read_split_by_split(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert read(tmp_path)[0] == [{"text": "train"}]
    assert "left out:" in read(tmp_path)[1][0]
    assert read(tmp_path, split="test")[0] == [{"text": "test"}]


def test_settings_beside_rows_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "a"}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    (tmp_path / "settings.json").write_text(json.dumps({"version": 1}, indent=1))
    (tmp_path / "lines.json").write_text('{"text": "b"}\n{"text": "c"}\n')
    (tmp_path / "picture.png").write_bytes(b"x")
    rows, notes = read(tmp_path)
    assert rows == [{"text": "b"}, {"text": "c"}, {"text": "a"}]
    assert notes[0].endswith("left out: dataset_info.json, picture.png, settings.json")


def test_a_folder_of_nothing_but_other_things_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match="no data files") as caught:
        read(tmp_path)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("it holds: README.md, a.xlsx; expected: ")


def test_a_file_called_eval_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "rows_train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rows_eval.jsonl").write_text('{"text": "b"}\n')
    assert read(tmp_path)[0] == [{"text": "a"}]
    assert read(tmp_path, split="validation")[0] == [{"text": "b"}]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_classes_stored_as_numbers_come_back_as_names(tmp_path: Path, kind: str) -> None:
    """As hub sets do: numbers would be read in the order of a trained head, which is another."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, None]}, features=features)
    if kind == "parquet":
        data.to_parquet(str(tmp_path / "a.parquet"))
    else:
        data.save_to_disk(str(tmp_path / "set"))
    assert [row.get("label") for row in read(tmp_path)[0]] == ["neg", "pos", None]


def test_what_others_write_beside_a_schema_is_no_fault(tmp_path: Path) -> None:
    table = pyarrow.table({"label": [1]}).replace_schema_metadata({"huggingface": '{"info": {"features": [1]}}'})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == [{"label": 1}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_number_is_text_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["2+5"], "completion": [7]}), tmp_path / name)
    else:
        jsonl = name == "a.jsonl"
        (tmp_path / name).write_text('{"prompt": "2+5", "completion": 7}' if jsonl else "prompt,completion\n2+5,7\n")
    assert to_example(read(tmp_path / name)[0][0], has_template=False) == Pair("2+5", "7")


def test_a_number_that_is_none_is_no_text() -> None:
    with pytest.raises(BadRowError, match="of type float"):
        to_example({"prompt": "a", "completion": float("nan")}, has_template=False)
