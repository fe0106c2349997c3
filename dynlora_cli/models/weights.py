"""A model's tensors on disk, one at a time: read, changed and written without ever building the model.

Files are read with plain reads and not mapped, since mapped pages count as the process's memory, and merging a model
should need no more of it than its largest tensor.

    Weights      the safetensors files of a model folder: names, shapes, single tensors
    write_like   new files with the same shards, in which some tensors are other ones
    write_files  the same, called as the caller says, and without an index
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import IndexForm, fits, inside, read_object
from dynlora_cli.files.whole import write_json
from dynlora_cli.models import pickles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 23  # bytes converted or copied at once
# Bytes written at once. With more, Linux looks for large pages, which a virtual machine may have to get from its host
# first: seven times as slow there, and no faster elsewhere (scripts/bench/NOTES.md).
_WRITE = 1 << 18
_WORKERS = 4  # threads at most; each has up to three pieces in memory
_AHEAD = 64  # pieces that may be queued


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` counts from the file's first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Space(threading.local):
    """Memory that is used again and again, one piece for each thread: the system clears new memory, which takes longer
    than filling it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in it; what was there before is gone."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)


class Weights:
    """The tensors of a model folder.

    Args:
        folder: with model.safetensors, or shards and their index.
        files: of one model, where they are called otherwise.

    Attributes:
        entries: by tensor name, in the order of files and of bytes.

    Raises:
        UsageError: no safetensors there, or files that are damaged, cut off or incomplete.
    """

    def __init__(self, folder: Path, files: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._piece = Space()
        self.entries: dict[str, Entry] = {}
        for file in files or self._files():
            self.entries |= entries_of(file)

    def _files(self) -> list[Path]:
        """As transformers looks for them: safetensors before pickles, one file before shards."""
        for single, shards in ((SINGLE, INDEX), (pickles.SINGLE, pickles.INDEX)):
            if (self.folder / single).is_file():
                return [self.folder / single]
            index = self.folder / shards
            if index.is_file():
                files = [inside(self.folder, name, index) for name in fits(IndexForm, read_object(index), index).files]
                if missing := [file.name for file in files if not file.is_file()]:
                    raise MachineError(
                        f"{self.folder} lacks {missing[0]}, which its index names", "fetch the model again"
                    )
                return files
        raise UsageError(f"{self.folder} holds no {SINGLE}", "name a folder with safetensors files")

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
        space: Space | None = None,
    ) -> Tensor:
        """One tensor, or its rows from first to last, in memory of its own and nothing beyond it.

        Converted on the way where a type is given. With `space` it lies in that memory, until that is used again.
        """
        entry = self.entries[name]
        first, last = rows or (0, entry.shape[0] if entry.shape else 1)
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        tensor = (space or torch.empty)(shape, dtype=dtype or entry.dtype)
        with entry.file.open("rb") as file:
            file.seek(entry.start + first * math.prod(entry.shape[1:]) * entry.dtype.itemsize)
            for part in _pieces(tensor):
                read = part if part.dtype == entry.dtype else self._piece(part.shape, dtype=entry.dtype)
                if file.readinto(_bytes(read)) != read.nbytes:
                    raise UsageError(f"{entry.file} ends inside {name}", "fetch the model again")
                if read is not part:
                    part.copy_(read)
        return tensor

    def locate(self, module: str, leaf: str = "weight") -> str | None:
        """The tensor of a module.

        A checkpoint may have been saved without the prefix that the module has in the adapted model (an encoder that
        got a classifier), or with one that it has not, so names that end alike will do where only one does.
        """
        name = f"{module}.{leaf}" if module else leaf
        if name in self.entries:
            return name
        without = name.partition(".")[2]
        if without in self.entries and name.count(".") > 1:
            return without
        longer = [other for other in self.entries if other.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None


def read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file: its bytes, and for each tensor dtype, shape and data_offsets.

    Raises:
        UsageError: it is none, or one that is cut off or damaged.
    """
    try:
        with safe_open(file, "pt"):  # looks at every type, shape and offset
            pass
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            text = handle.read(length)
        header = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no safetensors file, or cut off: {error}", "fetch the model again") from None
    header.pop("__metadata__", None)
    return text, header


def entries_of(file: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order of their bytes."""
    if file.suffix != ".safetensors":
        stored = pickles.stored_tensors(file)
        strange = next((name for name, tensor in stored.items() if tensor.dtype not in _CODES), None)
        if strange is not None:
            raise UsageError(
                f"{file}: the tensor {strange} has the type {stored[strange].dtype}, which is not understood"
            )
        return {
            name: Entry(file, tensor.dtype, tensor.shape, tensor.start, math.prod(tensor.shape) * tensor.dtype.itemsize)
            for name, tensor in stored.items()
        }
    text, header = read_header(file)
    entries = {}
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        first, last = info["data_offsets"]
        if info["dtype"] not in DTYPES:
            raise UsageError(f"{file}: the tensor {name} has the type {info['dtype']}, which is not understood")
        entries[name] = Entry(file, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + len(text) + first, last - first)
    return entries


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor as consecutive flat views, each small enough to be copied once more."""
    flat = tensor.view(-1)
    length = _CHUNK // flat.element_size()
    return (flat[at : at + length] for at in range(0, flat.numel(), length))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a flat, contiguous tensor."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class New:
    """A tensor that is made when its place in the file has come, so that only one is in memory at a time.

    `make` may give another type, such as fp32; it is converted on the way to the file. `rows` makes the same from its
    first row to its last, where rows can be made alone: then they are, as many as stay in the processor's cache.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_like(
    weights: Weights,
    folder: Path,
    changed: Mapping[str, New],
    added: Mapping[str, New],
) -> int:
    """Write the model again, shard by shard, with some tensors changed.

    Args:
        weights: of the model as it is.
        folder: an existing one.
        changed: new tensors by the name of the old one that each replaces.
        added: new tensors that are written into the last shard.

    Returns:
        Bytes of tensors written.
    """
    names = {file: _safetensors_name(file) for file in weights.files}
    total = write_files(weights, folder, names, changed, added)
    if list(names.values()) != [SINGLE]:
        placed = {name: names[entry.file] for name, entry in weights.entries.items()}
        placed |= dict.fromkeys(added, names[weights.files[-1]])
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    return total


def write_files(
    weights: Weights,
    folder: Path,
    names: Mapping[Path, str],
    changed: Mapping[str, New],
    added: Mapping[str, New] = {},
) -> int:
    """Write the model's files again; as `write_like`, with the names that each file has then, and without an index."""
    total = 0
    with _workers() as pool:
        for file, made in names.items():
            inside: dict[str, Entry | New] = {
                name: changed.get(name, entry) for name, entry in weights.entries.items() if entry.file == file
            }
            if file == weights.files[-1]:
                inside |= added
            with (folder / made).open("wb") as target:
                target.write(_header(inside))
                target.flush()
                _write_all(pool, target, inside.values())
            total += sum(item.size for item in inside.values())
    return total


def _safetensors_name(file: Path) -> str:
    """What a file of the model is called when it is written again: pytorch_model-1-of-2.bin becomes safetensors."""
    return f"{file.stem.replace('pytorch_model', 'model')}.safetensors"


def _header(items: Mapping[str, Entry | New]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, item in items.items():
        header[name] = {
            "dtype": _CODES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [at, at + item.size],
        }
        at += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


Piece = Callable[[], memoryview]


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute one piece each, without torch's own threads, which would wait for one another."""
    threads = torch.get_num_threads()
    count = min(max(2, threads), _WORKERS)  # two at least, so that one computes while one writes
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # for threads that start later


def _write_all(pool: ThreadPoolExecutor, target: BinaryIO, items: Iterable[Entry | New]) -> None:
    """Write tensors one after the other to a file that holds its header; pieces are made and written side by side.

    Raises:
        OSError: there is no room.
    """
    at, waiting = target.tell(), deque[Future[None]]()
    try:
        for item in items:
            for size, piece in _pieces_of(item):
                waiting.append(pool.submit(_write, target.fileno(), piece, at))
                at += size
                _await(waiting, _AHEAD)
            if isinstance(item, New) and item.rows is None:
                _await(waiting, 0)  # a tensor that is made as a whole is gone before the next is made
        _await(waiting, 0)
    finally:  # also after a failure: no thread may write to a closed file
        for future in waiting:
            future.cancel()
        wait(waiting)


def _await(waiting: deque[Future[None]], most: int) -> None:
    """Wait until no more than so many pieces are queued."""
    while len(waiting) > most:
        waiting[0].result()
        waiting.popleft()


def _write(target: int, piece: Piece, at: int) -> None:
    data = piece()
    while data:
        written = os.pwrite(target, data[:_WRITE], at)
        data, at = data[written:], at + written


def _pieces_of(item: Entry | New) -> Iterator[tuple[int, Piece]]:
    """A tensor's bytes in pieces, with the size of each."""
    if isinstance(item, Entry):
        for first in range(0, item.size, _CHUNK):
            size = min(_CHUNK, item.size - first)
            yield size, partial(_read, item, first, size)
    elif item.rows is not None:
        row = math.prod(item.shape[1:])
        count = max(1, _CHUNK // (4 * row))
        for first in range(0, item.shape[0], count):
            last = min(first + count, item.shape[0])
            yield (last - first) * row * item.dtype.itemsize, partial(_rows, item, first, last)
    else:
        tensor = item.make()
        assert tuple(tensor.shape) == item.shape, "the header has said another shape"
        for part in _pieces(tensor.contiguous()):
            yield part.numel() * item.dtype.itemsize, partial(_taken, item.dtype, [part])


_written = Space()


def _as(dtype: torch.dtype, part: Tensor) -> memoryview:
    """The bytes of a tensor in another type."""
    return _bytes(_written(part.shape, dtype).copy_(part).view(-1))


def _taken(dtype: torch.dtype, box: list[Tensor]) -> memoryview:
    """The same of a part of a whole tensor, which nobody holds any more afterwards."""
    return _as(dtype, box.pop())


def _rows(item: New, first: int, last: int) -> memoryview:
    assert item.rows is not None
    return _as(item.dtype, item.rows(first, last))


def _read(entry: Entry, first: int, size: int) -> memoryview:
    """Bytes of an old tensor."""
    data = _bytes(_written((size,), torch.uint8))
    with entry.file.open("rb") as source:
        source.seek(entry.start + first)
        if source.readinto(data) != size:
            raise UsageError(f"{entry.file} ends too early", "fetch the model again")
    return data
