"""Sources of a recipe to rows: local files and folders, hub data sets, the built-in set.

Local files are read with the standard library and pyarrow, not with `datasets`: that names the line of a fault, writes
no second copy into a cache, and starts two seconds sooner. Hub names go through `datasets.load_dataset`.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli import stdlib_docs
from dynlora_cli.errors import DataError, MachineError, UsageError

if TYPE_CHECKING:
    from dynlora_cli.recipe import Source

BUILTIN = "builtin:stdlib-docs"
TEXT_SUFFIXES = {".txt", ".md"}
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One file or hub split.

    Args:
        name: what a person calls it.
        read: gives pairs of a place (`data.jsonl:3`) and a row.
        whole_text: it is one text file: a single row with the column `text`, to be cut into pieces.
    """

    name: str
    read: Callable[[], Iterator[tuple[str, Row]]]
    whole_text: bool = False


def tables(source: Source, notes: list[str], *, held_out: bool) -> list[Table]:
    """The tables of one source; a folder has one for each file.

    Args:
        source: path, split, hub config.
        notes: what was chosen or left out is added here.
        held_out: whether validation rows are asked for; the built-in set keeps its own.

    Raises:
        UsageError: a local file is missing.
        MachineError: a hub data set is neither cached nor reachable.
        DataError: a folder without data files, an unknown kind of file, an unknown split.
    """
    if source.path.startswith("builtin:"):
        if source.path != BUILTIN:
            raise UsageError(f"dataset: there is no {source.path!r}", f"the built-in data set is {BUILTIN}")
        held_out = held_out or source.split != "train"
        return [Table(BUILTIN, lambda: _numbered(BUILTIN, stdlib_docs.rows("val" if held_out else "train")))]
    if not is_local(source.path):
        return [_hub(source)]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return [_table(file) for file in _files_of(path, source.split, notes)]
    if path.exists():
        return [_table(path)]
    raise UsageError(f"dataset: no file or folder {source.path}{_nearest(path)}", "paths start at the current folder")


def is_local(name: str) -> bool:
    """Whether a source is built in, a file or a folder, be it a missing one; anything else is a name on the hub."""
    path = Path(name).expanduser()
    like_a_path = path.suffix in _READERS or name.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    return like_a_path or path.exists()


def _nearest(path: Path) -> str:
    """`; in that folder: a.jsonl, b.jsonl`, nearest names first, or which folder is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f" (the folder {folder} does not exist)"
    shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    there = sorted(entry.name for entry in shown if entry.is_dir() or entry.suffix in _READERS)
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(str(folder / name)) for name in near)}?"
    return f"; {folder.resolve()} holds: {', '.join(there[:8])}" if there else f" (no data files in {folder})"


def _files_of(folder: Path, split: str, notes: list[str]) -> list[Path]:
    """Data files of a folder: those of the split where file names tell splits, tables before texts."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in _READERS and file.is_file())
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not shown:
        raise DataError(f"dataset: no data files in the folder {folder}", f"expected: {', '.join(sorted(_READERS))}")
    tabular = [file for file in shown if file.suffix not in TEXT_SUFFIXES]
    chosen = tabular or shown
    splits = {file: _split_of(file.relative_to(folder)) for file in chosen}
    if any(splits.values()):
        wanted = _split_of(Path(split)) or split
        chosen = [file for file in chosen if splits[file] == wanted]
        if not chosen:
            there = ", ".join(sorted({name for name in splits.values() if name}))
            raise DataError(f"dataset: no file of the split {split!r} in {folder}", f"splits there: {there}")
    left_out = [file for file in shown if file not in chosen]
    note = f"{folder}: reading {_listed(folder, chosen)}"
    notes.append(note + (f"; left out: {_listed(folder, left_out)}" if left_out else ""))
    return chosen


def _listed(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((split for split, names in _SPLIT_NAMES.items() if names & set(words)), None)


def _table(path: Path) -> Table:
    if path.suffix not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise DataError(f"dataset: {path} has an unknown kind {path.suffix!r}", f"expected one of: {known}")
    return Table(str(path), lambda: _guarded(path), whole_text=path.suffix in TEXT_SUFFIXES)


def _guarded(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file, with the faults every kind of file can have told in one way."""
    empty = True
    try:
        for place, row in _READERS[path.suffix](path):
            empty = False
            if not isinstance(row, dict):
                raise DataError(f"{place}: expected an object with columns, found {type(row).__name__}")
            yield place, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise DataError(f"{path}: no rows", "the file is empty")


def _numbered(name: str, rows: Any) -> Iterator[tuple[str, Row]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.rstrip(), path, number)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno})") from None


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of rows, an object with one list of rows in it, or JSON lines under a `.json` name."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return iter(())
    if text.lstrip()[0] == "{" and _is_json(text.lstrip().splitlines()[0]) and not _is_json(text):
        return _read_jsonl(path)
    content = _parse(text, path, 1)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            keys = ", ".join(map(str, content))
            raise DataError(
                f"{path}: expected a list of rows, found one object (keys: {keys})",
                "or use JSON lines: one row per line",
            )
        content = lists[0]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of rows, found {type(content).__name__}")
    return _numbered(str(path), content)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # whole documents in a field are normal here
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                    expected = len(reader.fieldnames or ())
                    raise DataError(
                        f"{path}:{reader.line_num}: {found} fields, the header has {expected}",
                        "quote fields that hold a separator",
                    )
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: _unfilled(value) for name, value in row.items()}
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a valid Parquet file ({str(error).splitlines()[0]})") from None


def _unfilled(value: Any) -> Any:
    """A column's value without the nulls that Arrow puts in objects for the keys that only other rows have.

    A chat template would write them out, such as arguments that a tool was never called with.
    """
    if isinstance(value, dict):
        return {key: _unfilled(part) for key, part in value.items() if part is not None}
    return [_unfilled(part) for part in value] if isinstance(value, list) else value


def _read_text(path: Path) -> Iterator[tuple[str, Row]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield str(path), {"text": text}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def _hub(source: Source) -> Table:
    """A hub data set; class labels stored as numbers come back as their names."""
    import datasets

    called = f"{source.path} ({source.name})" if source.name else source.path
    try:
        data = datasets.load_dataset(source.path, source.name, split=source.split)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise MachineError(
            f"dataset {called}: no such file or folder, and as a hub data set it is neither cached "
            f"nor reachable{offline}",
            f"check the name, or download it first: hf download --repo-type dataset {source.path}",
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            f"dataset {called}: it is read by a Python script of its own, which `datasets` no longer runs",
            "most have a copy in Parquet, to be named as a folder: hf download --repo-type dataset "
            f"--revision refs/convert/parquet --local-dir FOLDER {source.path}",
        ) from error
    except ValueError as error:  # unknown split or configuration: the library lists what there is
        raise DataError(f"dataset {called}, split {source.split!r}: {error}") from error
    if len(data) == 0:
        raise DataError(f"dataset {called}, split {source.split!r}: no rows")
    classes = {name: kind for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    # Objects that are stored as JSON have no keys but their own: a null there is meant.
    filled = {name for name, kind in data.features.items() if "Json(" not in repr(kind)}

    def read(row: Row) -> Row:
        given = {name: row[name] for name in classes if row[name] is not None and row[name] >= 0}
        whole = {name: _unfilled(value) if name in filled else value for name, value in row.items()}
        return whole | {name: classes[name].int2str(number) for name, number in given.items()}

    return Table(called, lambda: _numbered(called, map(read, data)))
