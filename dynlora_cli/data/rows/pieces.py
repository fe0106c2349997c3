"""Rows of a table about a thousand at a time: what is read, tokenised and handed to other processes in one go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dynlora_cli.errors import DynloraError

Row = dict[str, Any]
Places = Iterator[tuple[str, Row]]
_T = TypeVar("_T")

PIECE = 1024  # rows read in one go, and tokenised in one call
_PIECE_LENGTH = 1 << 22  # characters, of all pieces but the first


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a table that stand beside each other, with their places."""

    items: list[tuple[str, Row]]

    def rows(self) -> Iterable[tuple[str, Row]]:
        """The rows, each with its place."""
        return self.items


def in_pieces(rows: Iterable[tuple[str, Row]]) -> Iterator[Piece]:
    """Rows about a thousand at a time."""
    return map(Piece, cut_up(rows, lambda _: 0))


def cut_up(items: Iterable[_T], length: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Items about a thousand at a time, and fewer where they are long; before an error those that came before it."""
    piece: list[_T] = []
    held, most = 0, sys.maxsize  # the first thousand stay together: by them it is decided how rows are read
    try:
        for item in items:
            piece.append(item)
            held += length(item)
            if len(piece) == PIECE or held > most:
                yield piece
                piece, held, most = [], 0, _PIECE_LENGTH
    except (DynloraError, UnicodeError, OSError):
        if piece:
            yield piece
        raise
    if piece:
        yield piece
