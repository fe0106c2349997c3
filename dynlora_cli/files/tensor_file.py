"""A safetensors file without torch: how large it will be before anybody writes it, and what its header says."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN
from dynlora_cli.files.strict_json import loads

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}  # bytes of a number
LARGEST_HEADER = 100_000_000  # bytes; safetensors takes no larger one
Shapes = Mapping[str, tuple[str, Sequence[int]]]  # by name: the number format, and the shape


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensors by name, and texts under `__metadata__`; their bytes are not checked.

    Raises:
        UsageError: the file has none, or is cut off inside it.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path} is no file", "name one")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, path.stat().st_size):
                raise ValueError("it does not begin as such a file does, or is cut off")
            header = loads(file.read(length).decode())
        if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
            raise ValueError("its header is no table of tensors")
        texts = header.get("__metadata__") or {}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its metadata holds something else than texts")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", COPY_AGAIN) from None
    except (ValueError, struct.error) as error:
        what = "it is empty or cut off" if isinstance(error, struct.error) else str(error).partition(";")[0]
        raise UsageError(f"{path} is no safetensors file, or damaged: {what}", COPY_AGAIN) from None
    return header


def in_order(raw: bytes) -> bytes:
    """A file that safetensors has made, with its metadata in the order of their keys, which it writes in any order.

    Args:
        raw: the whole file; what comes back is as long, with the same tensors at the same places.
    """
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    texts = header.get("__metadata__", {})
    if len(texts) < 2:
        return raw
    header["__metadata__"] = dict(sorted(texts.items()))
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(written) <= length, "the order alone changes no length"
    return raw[:8] + written.ljust(length) + raw[8 + length :]


def file_bytes(tensors: Shapes, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that holds these tensors, as safetensors writes it with `{"format": "pt"}`.

    Args:
        tensors: of the file.
        metadata: texts in its header, in place of that one.

    Eight bytes, the header (JSON, filled up with spaces to a multiple of eight), then the numbers: widest format
    first, and names in order.
    """
    parts = parts_of_file(tensors).values()
    empty = EMPTY_HEADER if metadata is None else _length({"__metadata__": dict(metadata)})
    return 8 + -(-(empty + sum(entry for entry, _ in parts)) // 8) * 8 + sum(numbers for _, numbers in parts)


def parts_of_file(tensors: Shapes) -> dict[str, tuple[int, int]]:
    """Of each tensor by its name: bytes of its entry in the header, with the comma before it, and of its numbers."""
    parts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-WIDTHS[tensors[name][0]], name)):
        kind, shape = tensors[name]
        begin, end = end, end + WIDTHS[kind] * math.prod(shape)
        entry = {name: {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}}
        parts[name] = _length(entry) - len("{}") + len(","), end - begin
    return parts


def _length(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


EMPTY_HEADER = _length({"__metadata__": {"format": "pt"}})
