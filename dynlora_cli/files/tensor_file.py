"""How large a safetensors file is, before anybody writes it; known without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}  # bytes of a number
Shapes = Mapping[str, tuple[str, Sequence[int]]]  # by name: the number format, and the shape


def file_bytes(tensors: Shapes) -> int:
    """Bytes of the file that holds these tensors, as safetensors writes it with `{"format": "pt"}`.

    Eight bytes, the header (JSON, filled up with spaces to a multiple of eight), then the numbers: widest format
    first, and names in order.
    """
    parts = parts_of_file(tensors).values()
    return 8 + -(-(EMPTY_HEADER + sum(entry for entry, _ in parts)) // 8) * 8 + sum(numbers for _, numbers in parts)


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
