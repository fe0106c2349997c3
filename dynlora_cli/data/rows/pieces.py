"""Rows of a table about a thousand at a time: what is read, tokenised and handed to other processes in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dynlora_cli.errors import DynloraError

Row = dict[str, Any]
Places = Iterator[tuple[str, Row]]
_T = TypeVar("_T")

PIECE = 1024  # rows read in one go, and tokenised in one call
_MOST = 1 << 22  # characters of a piece, unless it is a single row: tokens take 40 times as much while they are made
_MOST_AT_FIRST = 1 << 26  # and of the first piece, by which it is decided how rows are read; it is cut up further then


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a table that stand beside each other, with their places."""

    items: list[tuple[str, Row]]

    def rows(self) -> Iterable[tuple[str, Row]]:
        """The rows, each with its place."""
        return self.items


def in_pieces(rows: Iterable[tuple[str, Row]]) -> Iterator[Piece]:
    """Rows about a thousand at a time."""
    return map(Piece, cut_up(rows, length_of))


def length_of(item: tuple[str, Row]) -> int:
    """Characters of the texts of a row."""
    return _characters(item[1])


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_characters, parts))


def cut_up(
    items: Iterable[_T], length: Callable[[_T], int], *, most_at_first: int = _MOST_AT_FIRST
) -> Iterator[list[_T]]:
    """Items about a thousand at a time, and fewer where they are long; before an error those that came before it.

    Args:
        items: to be cut up.
        length: characters of one.
        most_at_first: characters of the first piece.
    """
    piece: list[_T] = []
    held, most = 0, most_at_first
    try:
        for item in items:
            piece.append(item)
            held += length(item)
            if len(piece) == PIECE or held > most:
                yield piece
                piece, held, most = [], 0, _MOST
    except (DynloraError, UnicodeError, OSError):
        if piece:
            yield piece
        raise
    if piece:
        yield piece


def bounded(rows: Iterable[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    """Rows that are tokenised in one call, from rows that may be too long for that together."""
    return cut_up(rows, length_of, most_at_first=_MOST)
