"""Rows that lie on the disk as columns: a row is read when it is asked for, and the columns are mapped into memory.

    Writer      takes blocks of rows, and appends each column to its file
    Columns     the files of one list of rows, opened
    StoredRows  some of these rows, before the split (rows/kept.py)
    Stored      the examples of such rows

R rows of the list, K of a choice of them.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from struct import Struct
from threading import Lock
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.examples import Example, OneText
from dynlora_cli.data.rows.blocks import COLUMNS, CUT, TOKENS, TRUNCATED, Block, example_of
from dynlora_cli.data.rows.kept import KeptRows, Places, Prompts
from dynlora_cli.errors import MachineError
from dynlora_cli.files.whole import unfinished

_CHECK = Struct("<I")  # of the CRC-32 behind what is remembered of rows


class Writer:
    """Appends rows to the columns of a list.

    Args:
        folder: of the list; made here.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {
            name: self._open.enter_context((folder / name).open("wb")) for name in COLUMNS
        }
        self.rows = self._tokens = 0

    def add(self, block: Block) -> None:
        """Append rows."""
        block = block.moved("ends", self._tokens)
        for name, file in self._files.items():
            file.write(block.columns[name].tobytes())
        self.rows += len(block)
        self._tokens += len(block.columns[TOKENS])

    def close(self) -> None:
        """All rows are written."""
        self._open.close()


class Files:
    """The columns of one list of rows.

    Args:
        folder: of the list.

    Raises:
        OSError, ValueError: a file is missing, or has not the length that it must have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._one = folder, Lock()
        self.columns = {name: self._column(name, kind) for name, kind in COLUMNS.items() if name != TOKENS}
        if len({len(column) for column in self.columns.values()}) != 1:
            raise ValueError(f"the columns in {folder} are not of one length")
        self._tokens = (folder / TOKENS).open("rb")
        weakref.finalize(self, self._tokens.close)
        self.bytes = os.fstat(self._tokens.fileno()).st_size
        if self.bytes != (4 * int(self.columns["ends"][-1]) if len(self) else 0):
            raise ValueError(f"{folder / TOKENS} has not the tokens that its rows have")
        self.bytes += sum(column.nbytes for column in self.columns.values())

    def __len__(self) -> int:
        return len(self.columns["lengths"])

    def _column(self, name: str, kind: str) -> NDArray[Any]:
        path = self.folder / name
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, kind)
        return np.memmap(path, kind, mode="r")

    def example(self, place: int) -> OneText:
        """One row.

        Raises:
            MachineError: its tokens are not those that were written.
        """
        end, length = int(self.columns["ends"][place]), int(self.columns["lengths"][place])
        text = self._read(4 * (end - length), 4 * length)
        if zlib.crc32(text) != self.columns["checks"][place]:
            (self.folder / TOKENS).unlink(missing_ok=True)  # so that it is made anew
            raise MachineError(
                f"{self.folder / TOKENS} is damaged: a row is not what was written there",
                "start again: the rows are read anew from their files; look after the disk",
            )
        return example_of(
            np.frombuffer(text, "<i4"), int(self.columns["numbers"][place]), float(self.columns["confidences"][place])
        )

    def _read(self, start: int, length: int) -> bytes:
        """Bytes of the tokens, which are not mapped: pages once looked at would stay with the process."""
        if hasattr(os, "pread"):
            return os.pread(self._tokens.fileno(), length, start)
        with self._one:
            self._tokens.seek(start)
            return self._tokens.read(length)

    def remembered(self, what: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What was made once of these rows, or is made now."""
        path = self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
        try:
            return recalled(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError):  # damaged, or written by somebody else: it is made anew
            with suppress(OSError):
                path.unlink()
        made = make()
        keep(path, made)
        return made


def keep(path: Path, made: NDArray[Any]) -> None:
    """Write an array whole, with a checksum behind it; no matter if it cannot be, for it can be made again."""
    temporary, text = unfinished(path), BytesIO()
    np.save(text, made)
    try:
        temporary.write_bytes(text.getvalue() + _CHECK.pack(zlib.crc32(text.getbuffer())))
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def recalled(path: Path) -> NDArray[Any]:
    """An array as `keep` wrote it.

    Raises:
        OSError, ValueError, EOFError: it is not there, or is another.
    """
    text = path.read_bytes()
    if text[-_CHECK.size :] != _CHECK.pack(zlib.crc32(memoryview(text)[: -_CHECK.size])):
        raise ValueError(f"{path} is not what was written")
    found: NDArray[Any] = np.load(BytesIO(text), allow_pickle=False)
    return found


@dataclass(frozen=True)
class StoredRows(KeptRows):
    """Some rows of a list, in order.

    Args:
        files: of the list.
        places: of these rows in it, ascending. [K]
        source_ends: of the list, where the rows of each source end.
        name: how they were chosen.
    """

    files: Files
    places: Places
    source_ends: Sequence[int]
    name: str

    def __len__(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        return f"{self.files.folder.name} {self.name}"

    @property
    def examples(self) -> Stored:
        return Stored(self.files, self.places)

    @property
    def prompts(self) -> Prompts:
        return self.files.columns["prompts"][self.places]

    @property
    def sources(self) -> NDArray[np.integer[Any]]:
        return np.searchsorted(self.source_ends, self.places, side="right").astype(np.int32)

    def counts(self) -> dict[str, int]:
        columns = self.files.columns
        marks = columns["marks"][self.places]
        return {
            "rows": len(self),
            "tokens": int(columns["lengths"][self.places].sum(dtype=np.int64)),
            "supervised": int(columns["supervised"][self.places].sum(dtype=np.int64)),
            "truncated": int(((marks & TRUNCATED) != 0).sum()),
            "cut_answers": int(((marks & CUT) != 0).sum()),
        }

    def picked(self, places: Places, name: str) -> StoredRows:
        chosen = self.places[places]
        return StoredRows(self.files, chosen, self.source_ends, f"{self.name}, {name}")

    def remembered(self, what: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        return self.files.remembered(f"{self.name}: {what}", make)

    def followed_by(self, other: KeptRows) -> StoredRows:
        assert isinstance(other, StoredRows)
        places = np.concatenate([self.places, other.places])
        return StoredRows(self.files, places, self.source_ends, f"{self.name}; {other.name}")


@dataclass(frozen=True)
class Stored(Sequence[Example]):
    """The examples of rows of a list.

    Args:
        files: of the list.
        places: of the rows in it. [K]
        first: the number of the first of them; None: each has the number that it was read with.
    """

    files: Files
    places: Places
    first: int | None = field(default=None)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Stored: ...
    def __getitem__(self, at: int | slice) -> Example | Stored:
        if isinstance(at, slice):
            start, _, step = at.indices(len(self))
            assert step == 1 or self.first is None
            return Stored(self.files, self.places[at], None if self.first is None else self.first + start)
        at = range(len(self))[at]
        example = self.files.example(int(self.places[at]))
        if self.first is not None:
            example.row = self.first + at
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each. [K]"""
        found: NDArray[np.int32] = self.files.columns["lengths"][self.places]
        return found

    def numbers(self) -> NDArray[np.int64]:
        """`Example.row` of each. [K]"""
        if self.first is not None:
            return np.arange(self.first, self.first + len(self))
        found: NDArray[np.int64] = self.files.columns["numbers"][self.places]
        return found

    def confidences(self) -> NDArray[np.float64]:
        """`Example.confidence` of each. [K]"""
        found: NDArray[np.float64] = self.files.columns["confidences"][self.places]
        return found

    def renumbered(self, first: int) -> Stored:
        """The same rows with numbers from `first` on."""
        return Stored(self.files, self.places, first)
