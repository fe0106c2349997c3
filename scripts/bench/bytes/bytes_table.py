"""by_bytes.md, from the lines of by_bytes.jsonl."""

from __future__ import annotations

from typing import Any


def page(lines: list[dict[str, Any]]) -> str:
    return "# Loss against bytes\n"
