"""Rows that are read block by block: which, in which order, from where, and what does not go with that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import byte_tokenizer, dataset, source, task_named

from dynlora_cli.config.load import load_text
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.streaming.stream import Block, Stream
from dynlora_cli.errors import DataError, MachineError, RecipeError, UsageError


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{number} ", "completion": "the cat"} for number in range(count)]


def write(path: Path, name: str, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, count)), encoding="utf-8")
    return path


def load(*train: Any, task: str = "causal-lm", **settings: Any) -> Data:
    section = dataset(*train, **({"streaming": True, "shuffle": False} | settings))
    return load_data(section, byte_tokenizer(), task=task_named(task), seed=settings.get("seed", 0))


def stream_of(data: Data) -> Stream:
    assert data.stream is not None
    return data.stream


def shown(block: Block) -> list[str]:
    """The prompts of a block: `a0`."""
    text = byte_tokenizer()
    return [text.decode(row.input_ids, skip_special_tokens=True).split()[0] for row in block.examples]


def read(data: Data, blocks: int) -> list[list[str]]:
    stream = stream_of(data)
    return [shown(stream.first), *(shown(stream.block()) for _ in range(blocks - 1))]


def numbered(name: str, *numbers: int) -> list[str]:
    return [f"{name}{number}" for number in numbers]


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_pass_ends_a_block_and_the_next_begins_again(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", "a", 5), shuffle_buffer=2)
    first, second, last = numbered("a", 0, 1), numbered("a", 2, 3), numbered("a", 4)
    assert read(data, 6) == [first, second, last, first, second, last]
    assert stream_of(data).passes == 1
    assert stream_of(data).counts["rows"] == 5


def test_blocks_go_on_from_any_place(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 1), ("c", 4)):
        write(tmp_path / f"rows/{name}.jsonl", name, count)
    text = tmp_path / "notes.txt"
    text.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    data = load(tmp_path / "rows", text, shuffle_buffer=3, shuffle=True)
    stream = stream_of(data)
    blocks = [stream.block() for _ in range(12)]
    for number in (7, 1, 4, 11):
        stream.go_to(blocks[number].start)
        again = stream.block()
        assert (again.sha256, again.places, again.end) == (
            blocks[number].sha256,
            blocks[number].places,
            blocks[number].end,
        )


def test_files_come_in_another_order_in_each_pass(tmp_path: Path) -> None:
    for name in "abcdef":
        write(tmp_path / f"rows/{name}.jsonl", name, 2)
    blocks = read(load(tmp_path / "rows", shuffle_buffer=2, shuffle=True), 18)
    passes = ["".join(block[0][0] for block in blocks[at : at + 6]) for at in (0, 6, 12)]
    assert [sorted(each) for each in passes] == [list("abcdef")] * 3
    assert len({"abcdef", *passes}) == 4
    assert read(load(tmp_path / "rows", shuffle_buffer=2, shuffle=True), 18) == blocks


def test_a_block_has_its_rows_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "a", 3), write(tmp_path / "b.jsonl", "b", 2)
    data = load(a, b, shuffle=True)
    assert shown(stream_of(data).first) == [*numbered("a", 0, 1, 2), *numbered("b", 0, 1)]
    assert "5 rows to train on are read at first, and these are all" in data.notes[-1]


def test_sources_take_turns_until_they_end(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "a", 5), write(tmp_path / "b.jsonl", "b", 1)
    together = read(load(a, b, shuffle_buffer=2, shuffle=True), 4)
    assert together == [["a0", "b0"], ["a1", "a2"], ["a3", "a4"], ["a0", "b0"]]
    in_order = read(load(a, b, shuffle_buffer=2), 3)
    assert in_order == [["a0", "a1"], ["a2", "a3"], ["a4", "b0"]]


def test_weights_are_a_proportion_and_what_ends_begins_again(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "a", 4), write(tmp_path / "b.jsonl", "b", 3)
    data = load(source(a, weight=2.0), source(b, weight=1.0), shuffle_buffer=3)
    assert read(data, 4) == [["a0", "a1", "b0"], ["a2", "a3", "b1"], ["a0", "a1", "b2"], ["a2", "a3", "b0"]]
    assert "rows are taken from the sources by their weights" in data.notes[-1]


def test_a_source_gives_no_more_rows_than_it_is_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"rows/{name}.jsonl", name, 2)
    data = load(source(tmp_path / "rows", rows=3), shuffle_buffer=3, shuffle=True)
    first, *others = read(data, 4)
    assert len(first) == 3
    assert others == [first] * 3


# -- which rows ------------------------------------------------------------------------------------------------------


def test_the_same_prompts_are_held_out_in_whatever_order(tmp_path: Path) -> None:
    forward = load(write(tmp_path / "a.jsonl", "a", 40), val_size=0.2, shuffle_buffer=10)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    backward = load(tmp_path / "b.jsonl", val_size=0.2, shuffle_buffer=10)
    trained = [{prompt for block in read(data, 4) for prompt in block} for data in (forward, backward)]
    assert trained[0] == trained[1]
    assert len(trained[0]) < 40
    for data in (forward, backward):
        assert data.val
        assert stream_of(data).left_out == 40 - len(trained[0]) - len(data.val)


def test_no_row_is_held_out_where_the_first_block_has_none_to_measure_on(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", "a", 40), val_size=0.01, shuffle_buffer=4)
    assert not data.val
    assert any("no rows held out" in note for note in data.notes)
    assert sum(map(len, read(data, 10))) == 40


def test_rows_that_are_dropped_are_counted_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 4)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "long", "completion": "the cat " * 200}) + "\n")
    data = load(path, shuffle_buffer=2, overlong="drop")
    assert data.counts["train"]["dropped"] == 0
    assert read(data, 4) == [["a0", "a1"], ["a2", "a3"]] * 2
    assert stream_of(data).counts["dropped"] == 1


def test_nothing_to_learn_from_is_found_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "long", "completion": "the cat " * 200}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no token left to learn from: 1 row longer than max_length"):
        load(path, overlong="drop")
    good = write(tmp_path / "b.jsonl", "b", 2)
    with pytest.raises(DataError, match=r"a\.jsonl: none of its rows can be trained on, and its weight asks for some"):
        load(source(path, weight=2.0), source(good, weight=1.0), overlong="drop")


def test_files_of_all_kinds(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    write(rows / "a.jsonl", "a", 1)
    (rows / "b.csv").write_text("prompt,completion\nb0 ,the cat\n", encoding="utf-8")
    (rows / "c.json").write_text(json.dumps(rows_of("c", 1)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of("d", 1)), rows / "d.parquet")
    assert read(load(rows, shuffle_buffer=1), 4) == [["a0"], ["b0"], ["c0"], ["d0"]]


def test_files_that_match_a_pattern(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}{name}/rows.jsonl", name, 1)
    for streaming in (True, False):
        data = load(f"{tmp_path}/[ab]*/*.jsonl", streaming=streaming)
        assert len(data.train) == 2
        assert any(note.endswith(": 2 files, from rows.jsonl to rows.jsonl") for note in data.notes)
    with pytest.raises(UsageError, match=r"no file matches .*\*\.csv"):
        load(f"{tmp_path}/*.csv")


def test_a_note_on_every_file_is_one_note(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"rows/{name}.jsonl", name, 1)
    data = load(tmp_path / "rows", shuffle_buffer=1)
    later = [stream_of(data).block().notes for _ in range(4)]
    assert sum("format completion, chosen by its columns" in note for note in data.notes) == 1
    assert later == [[]] * 4


def test_classes_are_those_of_the_first_block(tmp_path: Path) -> None:
    rows = [{"text": f"the cat {number}", "label": label} for number, label in enumerate(("no", "yes", "yes", "maybe"))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load(path, task="sequence-classification", shuffle_buffer=2)
    assert data.labels == ["no", "yes"]
    with pytest.raises(DataError, match="the class 'maybe' is not among those of the training rows: no, yes"):
        stream_of(data).block()


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def serve(stored: Any) -> None:
        def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
            assert (path, name, split, streaming) == ("owner/set", None, "train", True)
            return stored

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return serve


def test_a_hub_data_set_is_not_downloaded_first(hub: Callable[[Any], None]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"the cat {number}" for number in range(6)], "label": [0, 1] * 3}
    hub(datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset(num_shards=3))
    data = load(source("owner/set"), task="sequence-classification", shuffle_buffer=4)
    assert data.labels == ["no", "yes"]
    again = stream_of(data).block()
    assert len(again.examples) == 2
    assert list(again.places.values()) == ["owner/set, row 5", "owner/set, row 6"]


def test_a_hub_that_goes_away_is_named_with_the_row(hub: Callable[[Any], None]) -> None:
    def rows() -> Any:
        yield from rows_of("a", 3)
        raise ConnectionError("Server Disconnected")

    hub(datasets.IterableDataset.from_generator(rows))
    with pytest.raises(MachineError, match=r"owner/set: cannot be read any further after row 3 \(Server Disc"):
        load(source("owner/set"), shuffle_buffer=5)
    hub(datasets.IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(DataError, match="owner/set: no rows"):
        load(source("owner/set"))


# -- what does not go with it ----------------------------------------------------------------------------------------

STREAMED = "model: builtin:tiny\ndataset: {train: a.jsonl, streaming: true%s}\n%s"


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("", "", "train.max_steps: nobody knows how many rows a stream has"),
        (", replay: {from: out/v1}", "train: {max_steps: 9}", "dataset.replay: replayed rows are drawn among all rows"),
        (", retrieve: {corpus: b}", "train: {max_steps: 9}", "dataset.retrieve: passages are looked for before"),
        (", cache: true", "train: {max_steps: 9}", "dataset.cache: rows of a stream are not kept on the disk"),
        (", workers: 2", "train: {max_steps: 9}", "dataset.workers: rows of a stream are not kept on the disk"),
        ("", "train: {max_steps: 9, objective: dpo}", "dataset.streaming: dpo looks at all rows before"),
        ("", "train: {max_steps: 9}\nadapter: {variant: text-to-lora}", "variant text-to-lora needs all rows before"),
    ],
)
def test_what_needs_all_rows_is_refused(data: str, more: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_text(STREAMED % (data, more), "recipe.yaml")
    assert message in caught.value.message


def test_a_buffer_without_a_stream_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"dataset.shuffle_buffer: rows are all in memory, and shuffled whole"):
        load_text("model: builtin:tiny\ndataset: {train: a.jsonl, shuffle_buffer: 5}\n", "recipe.yaml")
    text = (
        "model: {name_or_path: a, task: text-to-image}\ndataset: {train: a, streaming: true}\ntrain: {max_steps: 5}\n"
    )
    with pytest.raises(RecipeError, match=r"pictures are encoded before the first step"):
        load_text(text, "recipe.yaml")
