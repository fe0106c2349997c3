"""Rows that were read and not dropped, before they are split: each as an object, or all as columns of a store.

R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.examples import Example, Located

Prompts = NDArray[np.bytes_]  # hashes of 16 bytes, one for each row
PROMPT = "S16"
Places = NDArray[np.integer[Any]]


@dataclass(slots=True)
class Kept:
    """An example before the split, with what the counts need.

    `source` is its number in the recipe, `located` as of `Draft`.
    """

    example: Example
    prompt: bytes
    label: str | int | None
    truncated: bool
    cut_answer: bool
    source: int = 0
    located: Located | None = None


class KeptRows(ABC):
    """Rows of one list of the recipe, in order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """Their examples."""

    @property
    @abstractmethod
    def prompts(self) -> Prompts:
        """A hash of each one's prompt. [R]"""

    @property
    @abstractmethod
    def sources(self) -> NDArray[np.integer[Any]]:
        """The number of each one's source in the recipe. [R]"""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """rows, tokens, supervised, truncated and cut_answers, for the record."""

    @abstractmethod
    def picked(self, places: Places, name: str) -> KeptRows:
        """Some of them.

        Args:
            places: of these rows, ascending.
            name: how they were chosen; the same name always stands for the same rows.
        """

    @abstractmethod
    def remembered(self, what: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What `make` gives for these rows, which a store makes once.

        Args:
            what: names it, with all that it depends on beside the rows.
            make: makes it.
        """

    @abstractmethod
    def followed_by(self, other: KeptRows) -> KeptRows:
        """These rows and those of the next source."""


class KeptList(list[Kept], KeptRows):
    """Rows as objects."""

    @property
    def examples(self) -> Sequence[Example]:
        return [row.example for row in self]

    @property
    def prompts(self) -> Prompts:
        return prompts_of(row.prompt for row in self)

    @property
    def sources(self) -> NDArray[np.integer[Any]]:
        return np.array([row.source for row in self], np.int64)

    def counts(self) -> dict[str, int]:
        return counts_of(self)

    def picked(self, places: Places, name: str) -> KeptList:  # noqa: ARG002
        return KeptList(self[place] for place in places)

    def remembered(self, what: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:  # noqa: ARG002
        return make()

    def __str__(self) -> str:
        return "a list"

    def followed_by(self, other: KeptRows) -> KeptRows:
        return KeptList([*self, *listed(other)])


@dataclass(frozen=True, slots=True)
class PromptsOf:
    """The prompts of rows, which are looked at only where somebody asks: of several runs, one after the other."""

    parts: tuple[KeptRows | Prompts, ...] = ()

    @classmethod
    def of(cls, rows: KeptRows) -> PromptsOf:
        """Those of some rows; of objects, which may go, they are taken now."""
        return cls((rows.prompts if isinstance(rows, KeptList) else rows,))

    def __add__(self, other: PromptsOf) -> PromptsOf:
        return PromptsOf(self.parts + other.parts)

    def column(self) -> Prompts:
        """A hash of each row's prompt. [R]"""
        columns = [part if isinstance(part, np.ndarray) else part.prompts for part in self.parts]
        return np.concatenate([prompts_of([]), *columns])


def listed(rows: KeptRows) -> KeptList:
    """Rows that are known to be objects, as those of every kind that a store does not hold."""
    assert isinstance(rows, KeptList)
    return rows


def counts_of(rows: Sequence[Kept]) -> dict[str, int]:
    """What the record of a run says of rows."""
    return {
        "rows": len(rows),
        "tokens": sum(row.example.tokens for row in rows),
        "supervised": sum(row.example.supervised() for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "cut_answers": sum(row.cut_answer for row in rows),
    }


def prompts_of(hashes: Iterable[bytes]) -> Prompts:
    """Hashes of prompts as a column. [R]"""
    return np.array(list(hashes), PROMPT)
