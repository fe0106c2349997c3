"""The rows of one local file, by its kind. Every fault has the file and the line or row where it is.

Read with the standard library and pyarrow, not with `datasets`: that names the place of a fault, writes no second copy
into a cache, and starts two seconds sooner.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dynlora_cli.data.rows.pieces import Piece, Places, cut_up, in_pieces
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.files.strict_json import BadJsonError, loads

TEXT_SUFFIXES = {".txt", ".md"}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ADVICE = {
    ".xlsx": "save the sheet as CSV",
    ".xls": "save the sheet as CSV",
    ".gz": "unpack it: gunzip FILE",
    ".zip": "unpack it",
    ".zst": "unpack it: unzstd FILE",
    ".xz": "unpack it: unxz FILE",
}


def kind_of(path: Path) -> str:
    """The ending of a file's name, in small letters."""
    return path.suffix.lower()


def refuse_unknown_kind(path: Path) -> None:
    """Refuse a file that nothing here reads.

    Raises:
        DataError: with the kinds that are read.
    """
    kind = kind_of(path)
    if kind not in READERS:
        known = f"expected one of: {', '.join(sorted(READERS))}"
        advice = f"{_ADVICE[kind]}; {known}" if kind in _ADVICE else known
        raise DataError(f"dataset: {path} has an unknown kind {path.suffix!r}", advice)


@dataclass(frozen=True, slots=True)
class Lines(Piece):
    """Lines of a file of JSON, not parsed yet, with their numbers."""

    items: list[tuple[int, str]]  # type: ignore[assignment]
    path: Path

    def rows(self) -> Places:
        """The rows, parsed one after the other."""
        parsed = ((f"{self.path}:{number}", _parse(line.rstrip(), self.path, number)) for number, line in self.items)
        return _checked(parsed)


def read_rows(path: Path, notes: list[str]) -> Places:
    """Rows of a file of a known kind, each with its place (`data.jsonl:3`).

    Args, Raises: as of `read_pieces`.
    """
    return (row for piece in read_pieces(path, notes) for row in piece.rows())


def read_pieces(path: Path, notes: list[str]) -> Iterator[Piece]:
    """Rows of a file of a known kind, about a thousand at a time.

    Args:
        path: its ending is among those of `READERS`.
        notes: what was found out about the file (encoding, separator) is added here.

    Raises:
        DataError: no rows, or one that cannot be read. UsageError: the file cannot.
    """
    empty, encoding = True, "utf-8-sig"
    try:
        if kind_of(path) not in _BINARY:
            encoding = _encoding(path, notes)
        if kind_of(path) in _LINES:
            lines = cut_up(_lines(path, encoding), lambda line: len(line[1]))
            cut: Iterator[Piece] = (Lines(part, path) for part in lines)
        else:
            cut = in_pieces(_checked(READERS[kind_of(path)](path, encoding, notes)))
        for piece in cut:
            empty = False
            yield piece
    except UnicodeError:
        line = _undecodable(path, encoding)
        name = encoding.upper().removesuffix("-SIG")
        raise DataError(f"{path}:{line}: not {name} text", "save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise DataError(f"{path}: no rows", "the file is empty")


def _checked(rows: Iterable[tuple[str, Any]]) -> Places:
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with columns, found {type(row).__name__}")
        yield place, row


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Rows with places that count from 1."""
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def holds_rows(path: Path) -> bool:
    """Whether a JSON file may be a table: not a single object that has no list of rows in it, as settings are."""
    with path.open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return True
    try:
        content = loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeError, BadJsonError):  # JSON lines, or what its reader will name
        return True
    return _the_list(content) is not None


# -- text ------------------------------------------------------------------------------------------------------------


def _encoding(path: Path, notes: list[str]) -> str:
    """UTF-8, or what the mark at the file's start says.

    Raises:
        DataError: the file holds NUL characters, so it is something else.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            notes.append(f"{path}: read as {name.upper()}, by the mark at its start")
            return name
    if b"\0" in head:
        raise DataError(f"{path}: holds NUL characters, so it is no text in UTF-8", "save the file as UTF-8")
    return "utf-8-sig"


def _undecodable(path: Path, encoding: str) -> int:
    """The first line that is not in an encoding; the last one where the fault is in how they follow each other."""
    number = 1
    if encoding == "utf-8-sig":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return number
    return number


def _read_jsonl(path: Path, encoding: str, notes: list[str]) -> Places:  # noqa: ARG001 - one signature for all kinds
    return ((f"{path}:{number}", _parse(line.rstrip(), path, number)) for number, line in _lines(path, encoding))


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return loads(text)
    except BadJsonError as error:
        place = f"{path}:{first_line + error.line - 1}" if error.line else _place_of_fault(text, path, first_line)
        raise DataError(f"{place}: {error.reason}") from None


def _place_of_fault(text: str, path: Path, first_line: int) -> str:
    """Where a row is that no parser gives a line for: the row of a list, or the line of a text of one line."""
    decoder, at, number = json.JSONDecoder(), text.find("[") + 1, 0
    if not text.lstrip().startswith("["):
        return f"{path}:{first_line}" if "\n" not in text else str(path)
    while True:
        start, number = re.compile(r"[\s,]*").match(text, at).end(), number + 1  # type: ignore[union-attr]
        try:
            _, at = decoder.raw_decode(text, start)
            loads(text[start:at])
        except (ValueError, RecursionError):  # this row, or the end of the list: the fault is in all of it
            return f"{path}, row {number}" if text[start : start + 1] != "]" else str(path)


def _read_json(path: Path, encoding: str, notes: list[str]) -> Iterator[tuple[str, Any]]:
    """A list of rows, an object with one list of rows in it, or JSON lines under a `.json` name."""
    text = path.read_text(encoding=encoding)
    if not text.strip():
        return iter(())
    if text.lstrip()[0] == "{" and _is_json(text.lstrip().splitlines()[0]) and not _is_json(text):
        return _read_jsonl(path, encoding, notes)
    content = _parse(text, path, 1)
    rows = _the_list(content)
    if rows is None:
        found = f"one object (keys: {', '.join(map(str, content))})" if isinstance(content, dict) else repr(content)
        raise DataError(
            f"{path}: expected a list of rows, found {found[:200]}",
            "write rows as a list, [{...}, {...}], or as JSON lines: one row per line, in a file that ends in .jsonl",
        )
    return numbered(str(path), rows)


def _the_list(content: Any) -> list[Any] | None:
    """The rows of a JSON text: the text itself, or the only list in its object."""
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    return content if isinstance(content, list) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_csv(path: Path, encoding: str, notes: list[str]) -> Places:
    csv.field_size_limit(2**31 - 1)  # whole documents in a field are normal here
    with path.open(encoding=encoding, newline="") as file:
        separator, skipped = _separator(path, file, notes)
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            _refuse_twice(f"{path}:{skipped + 1}", reader.fieldnames or ())
            for row in reader:
                place = f"{path}:{skipped + reader.line_num}"
                if None in row or None in row.values():
                    found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                    expected = len(reader.fieldnames or ())
                    raise DataError(
                        f"{place}: {found} fields, the header has {expected}", "quote fields that hold a separator"
                    )
                if any("\0" in value for value in row.values()):
                    raise DataError(f"{place}: holds a NUL character, which no text has")
                yield place, row
        except csv.Error as error:
            place = f"{path}:{skipped + reader.line_num}"
            raise DataError(f"{place}: not valid CSV with {_SEPARATORS.get(separator, separator)} ({error})") from None


def _separator(path: Path, file: TextIO, notes: list[str]) -> tuple[str, int]:
    """What separates fields, and how many lines stand before the header.

    That of the file's name, unless the header is a single field with it and several with another: programs write
    semicolons into .csv wherever the comma is a decimal point. Some say so in a first line, `sep=;`.
    """
    usual = "\t" if kind_of(path) == ".tsv" else ","
    header = file.readline()
    if said := re.fullmatch(r"sep=(.)\s*", header, re.IGNORECASE):
        return said[1], 1
    file.seek(0)
    for separator in [usual, *_SEPARATORS]:
        if len(next(csv.reader([header], delimiter=separator), [])) > 1:
            if separator != usual:
                notes.append(f"{path}: its fields are separated by {_SEPARATORS[separator]}, to judge by the header")
            return separator, 0
    return usual, 0


def _refuse_twice(place: str, columns: Sequence[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{place}: the column {twice[0]!r} is there twice", "rename or remove one of them")


def _read_text(path: Path, encoding: str, notes: list[str]) -> Places:  # noqa: ARG001 - one signature for all kinds
    text = path.read_text(encoding=encoding)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: holds a NUL character, which no text has")
    if text.strip():
        yield str(path), {"text": text}


# -- Arrow -----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, encoding: str, notes: list[str]) -> Places:  # noqa: ARG001 - one signature for all kinds
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_rows(path, file.iter_batches(batch_size=1024))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a valid Parquet file ({_first_line(error)})") from None


def _read_arrow(path: Path, encoding: str, notes: list[str]) -> Places:  # noqa: ARG001 - one signature for all kinds
    """What `datasets` saves (a stream), and Feather files, which hold the same batches and a list of them."""
    import pyarrow
    import pyarrow.ipc

    def sound(batch: Any) -> Any:
        batch.validate(full=True)  # offsets that somebody else wrote lead out of the file
        return batch

    try:
        with pyarrow.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                listed = pyarrow.ipc.open_file(file)
                yield from _arrow_rows(path, (sound(listed.get_batch(at)) for at in range(listed.num_record_batches)))
            else:
                file.seek(0)
                yield from _arrow_rows(path, map(sound, pyarrow.ipc.open_stream(file)))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a valid Arrow file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _arrow_rows(path: Path, batches: Iterable[Any]) -> Places:
    number = 0
    for batch in batches:
        _refuse_twice(str(path), batch.schema.names)
        classes = _classes(batch.schema)
        columns = [_values(path, name, batch[name], number) for name in batch.schema.names]
        columns = [_named(values, classes.get(at)) for at, values in zip(batch.schema.names, columns, strict=True)]
        for values in zip(*columns, strict=True):
            number += 1
            yield f"{path}, row {number}", dict(zip(batch.schema.names, map(unfilled, values), strict=True))


def _classes(schema: Any) -> dict[str, list[str]]:
    """Names of the classes that `datasets` stores as numbers, by column: it writes them beside the schema."""
    try:
        features = loads((schema.metadata or {}).get(b"huggingface", b"{}").decode())["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(each) for each in kind["names"]] for name, kind in kinds.items()}
    except (ValueError, LookupError, TypeError, AttributeError):  # what somebody else wrote there
        return {}


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Numbers of classes as the classes' names; as they are where they have none."""
    if not names:
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in values]


def _values(path: Path, name: str, column: Any, before: int) -> list[Any]:
    """The column's values as Python's; as Arrow's own where Python has none, such as for the year 20,000."""
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        for number, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError:
                raise DataError(f"{path}, row {number}: column {name!r} is not UTF-8 text") from None
        raise
    except (OverflowError, ValueError, pyarrow.ArrowException):
        return list(column)


def unfilled(value: Any) -> Any:
    """A column's value without the nulls that Arrow puts in objects for the keys that only other rows have.

    A chat template would write them out, such as arguments that a tool was never called with.
    """
    if isinstance(value, dict):
        return {key: unfilled(part) for key, part in value.items() if part is not None}
    return [unfilled(part) for part in value] if isinstance(value, list) else value


_BINARY = {".parquet", ".arrow", ".feather"}
_LINES = {".jsonl", ".ndjson"}
READERS: dict[str, Callable[[Path, str, list[str]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}
