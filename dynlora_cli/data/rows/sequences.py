"""Examples in a row, in a list or out of a store: what is asked of all of them at once.

A store (rows/stored.py) answers from its columns; a list is gone through.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.examples import Example


@runtime_checkable
class Columns(Protocol):
    """Examples that know these of all their rows without reading them. R rows."""

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of the longest line of each. [R]"""
        ...

    def numbers(self) -> NDArray[np.int64]:
        """`Example.row` of each. [R]"""
        ...

    def confidences(self) -> NDArray[np.float64]:
        """`Example.confidence` of each. [R]"""
        ...

    def renumbered(self, first: int) -> Sequence[Example]:
        """The same rows with numbers from `first` on."""
        ...


class Joined(Sequence[Example]):
    """Several sequences of examples as one, none of which is copied."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | Sequence[Example]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        number = bisect_right(self._ends, at)
        return self.parts[number][at - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Example]:
        for part in self.parts:
            yield from part


def joined(*parts: Sequence[Example]) -> Sequence[Example]:
    """Several sequences as one: a list where all are lists."""
    there = [part for part in parts if len(part)]
    if len(there) == 1:
        return there[0]
    if all(isinstance(part, list) for part in there):
        return [example for part in there for example in part]
    return Joined(there)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """Tokens of the longest line of each example. [R]"""
    lengths = _by_parts(examples, "lengths", lambda example: max(map(len, example.lines)))
    return lengths.astype(np.int32, copy=False)


def longest_of(examples: Sequence[Example]) -> int:
    """Tokens of the longest text of all of them."""
    return int(_by_parts(examples, "lengths", lambda example: example.longest).max())


def unsure_of(examples: Sequence[Example]) -> int:
    """How many of them have a confidence below 1."""
    return int((confidences_of(examples) != 1).sum())


def confidences_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    """`Example.confidence` of each. [R]"""
    return _by_parts(examples, "confidences", lambda example: example.confidence).astype(np.float64, copy=False)


def numbers_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """`Example.row` of each. [R]"""
    return _by_parts(examples, "numbers", lambda example: example.row).astype(np.int64, copy=False)


def tokens_of(examples: Sequence[Example]) -> int:
    """Tokens of all of them. Stored ones are one text each."""
    if isinstance(examples, Joined):
        return sum(map(tokens_of, examples.parts))
    if isinstance(examples, Columns):
        return int(examples.lengths().sum(dtype=np.int64))
    return sum(example.tokens for example in examples)


def renumbered(examples: Sequence[Example], first: int) -> Sequence[Example]:
    """The examples with numbers from `first` on; those of a list are changed."""
    if isinstance(examples, Columns):
        return examples.renumbered(first)
    for row, example in enumerate(examples, first):
        example.row = row  # type: ignore[misc]  # a slot of whichever class it is
    return examples


def _by_parts(examples: Sequence[Example], name: str, ask: Any) -> NDArray[Any]:
    if isinstance(examples, Joined):
        return np.concatenate([_by_parts(part, name, ask) for part in examples.parts] or [np.zeros(0)])
    if isinstance(examples, Columns):
        found: NDArray[Any] = getattr(examples, name)()
        return found
    return np.array([ask(example) for example in examples])
