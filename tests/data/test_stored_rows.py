"""Rows that are kept on the disk give the same data, told in the same words, as rows that are held in memory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import CHATML, byte_tokenizer, task_named

from dynlora_cli.config.sections import Dataset
from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.rows import pieces
from dynlora_cli.data.rows import team as teams
from dynlora_cli.data.rows.cache import FOLDER, MOST
from dynlora_cli.data.rows.stored import Stored
from dynlora_cli.errors import DataError, DynloraError, MachineError, UsageError

MANY = 2500  # more than two pieces


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def pairs(path: Path, count: int, **more: Any) -> Path:
    rows = [{"prompt": f"what is {at % 37}?", "completion": f"it is {at}" * (1 + at % 9)} | more for at in range(count)]
    for at in range(3, count, 50):
        rows[at]["confidence"] = 0.25
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talks(path: Path, count: int) -> Path:
    """Conversations, of which some think, some say nothing, and some are unanswered."""
    with path.open("w") as file:
        for at in range(count):
            said = ["<think>hm</think>yes", "no", "", "the cat sat"][at % 4]
            messages = [{"role": "user", "content": f"cat {at}?"}, {"role": "assistant", "content": said}]
            messages = messages[:1] if at % 61 == 60 else messages
            file.write(json.dumps({"messages": messages, "note": "x" if at == count - 1 else ""}) + "\n")
    return path


def read(settings: dict[str, Any], template: str | None = None, **how: Any) -> Data:
    dataset = Dataset(**(settings | how))
    return load_data(dataset, byte_tokenizer(template), task=task_named(), seed=3, sizing=8)


def same(one: Data, other: Data) -> None:
    assert isinstance(other.train, Stored)
    for name in ("train", "val", "sizing"):
        assert list(getattr(one, name)) == list(getattr(other, name))
    for name in ("sha256", "counts", "spans", "forms", "confidence", "labels", "kind"):
        assert getattr(one, name) == getattr(other, name)
    assert one.writing.turned == other.writing.turned
    assert [note for note in other.notes if "are kept in" not in note] == one.notes
    assert all((one.prompts[part].column() == other.prompts[part].column()).all() for part in one.prompts)


CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "pairs": ({"max_length": 40}, None),
    "turns": ({"max_length": 40}, CHATML),
    "some rows, weights, two sources": ({"train": [{"rows": 31, "weight": 2.0}, {"weight": 0.5}]}, None),
    "rows to measure on": ({"val": [{}], "overlong": "drop", "max_length": 24}, None),
    "all": ({"train_on": "all", "val_size": 0.0, "separator": "\n"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_small_files_give_the_same(case: str, tmp_path: Path) -> None:
    settings, template = CASES[case]
    settings = dict(settings)
    for name in ("train", "val"):
        found = settings.get(name, [{}] if name == "train" else [])
        settings[name] = [
            one | {"path": str(pairs(tmp_path / f"{name}{at}.jsonl", 90 + at))} for at, one in enumerate(found)
        ]
    expected = read(settings, template, cache=False)
    for _ in range(2):  # read, and read again from where it is kept
        same(expected, read(settings, template, cache=True, workers=1))


def test_several_processes_give_the_same(tmp_path: Path, cache: Path) -> None:
    """Though what one piece tells decides how the next is read, and a reasoning row is several."""
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
    )
    settings = {"train": [{"path": str(talks(tmp_path / "talks.jsonl", MANY))}], "max_length": 64}
    expected = read(settings, template, cache=False)
    assert any("with reasoning" in note for note in expected.notes)
    assert any("columns that are not read: note" in note for note in expected.notes)
    first = read(settings, template, cache=True, workers=2)
    same(expected, first)
    again = read(settings, template, cache=True, workers=2)
    same(expected, again)
    assert first.notes == again.notes
    assert str(cache) in first.notes[0]


def test_a_row_at_fault_is_named_as_ever(tmp_path: Path, cache: Path) -> None:
    path = pairs(tmp_path / "rows.jsonl", MANY)
    lines = path.read_text().splitlines()
    lines[2300] = '{"prompt": "a"}'
    path.write_text("\n".join(lines))
    said = []
    for how in ({"cache": False}, {"cache": True, "workers": 2}):
        with pytest.raises(DataError) as caught:
            read({"train": [{"path": str(path)}]}, None, **how)
        said.append((caught.value.message, caught.value.hint))
    assert said[0] == said[1]
    assert "rows.jsonl:2301: " in said[0][0]
    assert not list(cache.glob("*/about.json"))
    assert not list(cache.glob(".*.tmp"))


def test_a_column_that_changes_late_is_refused_where_it_does(tmp_path: Path) -> None:
    path = pairs(tmp_path / "rows.jsonl", MANY, split="train")
    text = path.read_text().splitlines()
    text[2200] = text[2200].replace('"train"', '"test"')
    path.write_text("\n".join(text))
    said = []
    for how in ({"cache": False}, {"cache": True, "workers": 2}):
        with pytest.raises(DataError) as caught:
            read({"train": [{"path": str(path)}]}, None, **how)
        said.append(caught.value.message)
    assert said[0] == said[1]
    assert "rows.jsonl:2201: column 'split'" in said[0]


def test_a_process_that_dies_ends_the_reading(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = teams.Team.__init__

    def begun(self: teams.Team, *given: Any) -> None:
        begin(self, *given)
        self._workers[0]._process.kill()

    monkeypatch.setattr(teams.Team, "__init__", begun)
    path = pairs(tmp_path / "rows.jsonl", 8 * 1024)
    with pytest.raises(MachineError, match="a process that reads rows was killed by SIGKILL"):
        read({"train": [{"path": str(path)}]}, None, cache=True, workers=2)
    assert not list(cache.glob("*/about.json"))


def kept(cache: Path) -> Path:
    (about,) = cache.glob("*/about.json")
    return about.parent


@pytest.mark.parametrize("harm", ["cut", "gone", "numbers", "about", "told"])
def test_what_is_damaged_is_made_anew(harm: str, tmp_path: Path, cache: Path) -> None:
    settings = {"train": [{"path": str(pairs(tmp_path / "rows.jsonl", 60))}]}
    expected = read(settings, None, cache=False)
    read(settings, None, cache=True)
    tokens, numbers, about = (kept(cache) / name for name in ("train/tokens", "train/numbers", "about.json"))
    if harm == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif harm == "gone":
        tokens.unlink()
    elif harm == "numbers":
        numbers.write_bytes(numbers.read_bytes()[::-1])
    elif harm == "told":
        about.write_text(about.read_text().replace("completion", "complexion"))
    else:
        about.write_text(about.read_text()[:-20])
    again = read(settings, None, cache=True)
    assert "is damaged" in again.notes[0]
    again.notes = again.notes[1:]
    same(expected, again)


def test_a_damaged_token_is_never_trained_on(tmp_path: Path, cache: Path) -> None:
    settings = {"train": [{"path": str(pairs(tmp_path / "rows.jsonl", 60))}]}
    data = read(settings, None, cache=True)
    tokens = kept(cache) / "train" / "tokens"
    found = np.fromfile(tokens, "<i4")
    found[5] += 1
    with tokens.open("r+b") as file:
        file.write(found.tobytes())
    with pytest.raises(MachineError, match="damaged"):
        assert [*data.train, *data.val] == []
    assert "is damaged" in read(settings, None, cache=True).notes[0]


def test_what_was_remembered_is_made_anew_where_it_is_damaged(tmp_path: Path, cache: Path) -> None:
    """One bit of which rows are held out, or of the hash of the data, would be believed."""
    settings = {"train": [{"path": str(pairs(tmp_path / "rows.jsonl", 60)), "rows": 40}]}
    first = read(settings, None, cache=True)
    remembered = list(kept(cache).rglob("*.npy"))
    assert len(remembered) > 2
    for path in remembered:
        content = bytearray(path.read_bytes())
        content[-12] ^= 1
        path.write_bytes(content)
    same(read(settings, None, cache=False), read(settings, None, cache=True))
    assert read(settings, None, cache=True).sha256 == first.sha256


def test_a_file_that_changes_is_read_again(tmp_path: Path, cache: Path) -> None:
    path = pairs(tmp_path / "rows.jsonl", 60)
    settings = {"train": [{"path": str(path)}]}
    first, stat = read(settings, None, cache=True), path.stat()
    path.write_text(path.read_text().replace("it is", "it be"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert read(settings, None, cache=True).sha256 != first.sha256


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynlora_cli.data.rows import cache as kept_rows

    path, read_source = pairs(tmp_path / "rows.jsonl", 60), kept_rows.read_source

    def read_and_change(*given: Any, **more: Any) -> int:
        count = read_source(*given, **more)
        with path.open("a") as file:
            file.write("\n")
        return count

    monkeypatch.setattr(kept_rows, "read_source", read_and_change)
    with pytest.raises(DataError, match="has changed while it was read"):
        read({"train": [{"path": str(path)}]}, None, cache=True)
    assert not list(cache.glob("*/about.json"))


@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_file_that_changes_after_it_was_hashed_is_refused(
    change: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as while another run reads the same rows, which this one waits for."""
    from dynlora_cli.data.rows import cache as kept_rows

    path, key_of = pairs(tmp_path / "rows.jsonl", 60), kept_rows.key_of

    def key_and_change(*given: Any) -> str:
        key = key_of(*given)
        path.write_text(path.read_text().replace("it is", "it be")) if change == "other" else path.unlink()
        return key

    monkeypatch.setattr(kept_rows, "key_of", key_and_change)
    with pytest.raises((DataError, UsageError), match=r"has changed while it was read|no file or folder"):
        read({"train": [{"path": str(path)}]}, None, cache=True)
    assert not list(cache.glob("*/about.json"))


def test_who_waits_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynlora_cli.data.rows import cache as kept_rows

    monkeypatch.setattr(kept_rows, "LARGE", 1)
    monkeypatch.setattr(kept_rows, "_EVERY", 0.0)
    lock, said = kept_rows._lock, list[str]()
    monkeypatch.setattr(kept_rows, "_lock", lambda file, wait: lock(file, wait=wait) if wait else False)
    settings = Dataset(train=[{"path": str(pairs(tmp_path / "rows.jsonl", 60))}], workers=1)
    load_data(settings, byte_tokenizer(), task=task_named(), seed=3, tell=said.append)
    waiting, reading, so_far = said
    assert waiting == "another run reads the same rows: waiting for it"
    assert reading.startswith("reading ")
    assert str(cache) in reading
    assert so_far == "60 rows read so far"


def test_the_cache_keeps_within_its_size(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        path = pairs(tmp_path / f"rows{number}.jsonl", 60 + number)
        read({"train": [{"path": str(path)}]}, None, cache=True)
        for about in cache.glob("*/about.json"):
            os.utime(about, (time.time() - 100, about.stat().st_mtime - 100))
    monkeypatch.setenv(MOST, "0.00001")
    notes = read({"train": [{"path": str(tmp_path / "rows1.jsonl")}]}, None, cache=True).notes
    assert sum("was removed" in note for note in notes) == 2
    assert kept(cache)
    monkeypatch.setenv(MOST, "much")
    with pytest.raises(UsageError, match="no number of gigabytes"):
        read({"train": [{"path": str(tmp_path / "rows1.jsonl")}]}, None, cache=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.raises(MachineError, match="the rows cannot be kept there") as caught:
        read({"train": [{"path": str(pairs(tmp_path / "rows.jsonl", 60))}]}, None, cache=True)
    assert "DYNLORA_CACHE" in str(caught.value.hint)


def test_a_full_disk_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynlora_cli.data.rows import stored

    def full(self: Any, block: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.Writer, "add", full)
    with pytest.raises(MachineError, match="do not fit"):
        read({"train": [{"path": str(pairs(tmp_path / "rows.jsonl", 60))}]}, None, cache=True)
    assert not [*cache.glob(".*.tmp"), *cache.glob("*/about.json")]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_long_rows_are_tokenised_a_few_at_a_time(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand rows of a megabyte the tokens take 40 GB while they are made."""
    rows, calls = [{"text": f"{at} " * 40} for at in range(60)], list[int]()
    path = tmp_path / f"rows.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    expected = read({"train": [{"path": str(path)}]}, None, cache=False)
    encode = TextEncoder.encode

    def counted(encoder: TextEncoder, rows: list[Any]) -> Any:
        calls.append(sum(len(row.form.text) for row in rows))
        return encode(encoder, rows)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    monkeypatch.setattr(pieces, "_MOST", 300)
    same(expected, read({"train": [{"path": str(path)}]}, None, cache=True, workers=1))
    assert sum(calls) == sum(len(row["text"]) for row in rows)
    assert max(calls) < 300 + 120


def test_what_is_not_kept_is_said(tmp_path: Path) -> None:
    settings = {"train": [{"path": str(pairs(tmp_path / "a.jsonl", 60)), "descriptions": ["numbers"]}]}
    said = "the rows are held in memory, and not kept (dataset.cache): the rows have descriptions"
    assert said in read(settings, None, cache=True).notes
    plain = read({"train": [{"path": str(tmp_path / "a.jsonl")}]}, None)
    assert isinstance(plain.train, list), "small files are held in memory"


def test_errors_of_files_come_first(tmp_path: Path) -> None:
    with pytest.raises(DynloraError, match="no file or folder"):
        read({"train": [{"path": str(tmp_path / "none.jsonl")}]}, None, cache=True)
