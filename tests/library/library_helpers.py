"""What the tests of libraries share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Made(NamedTuple):
    """A library with one update, `first`, and an adapter of another tool on the same base that is not in it."""

    root: Path
    run: Path
    base: Path
    other: Path
    rows: Path


def silent(text: str) -> None:
    """Takes what a person would be told."""
