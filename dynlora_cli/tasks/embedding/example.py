"""A row of texts that become vectors: a query, the passage that belongs to it, and passages that do not."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dynlora_cli.data.examples import Example, Judge, Lines, Targets


@dataclass(slots=True)
class Related(Example):
    """Texts of one row.

    Args:
        parts: tokens of the query, of its passage, and of passages that are wrong; or of two texts with a score.
        row: as of `Example`.
        judge: as of `Example`.
        score: how well the two texts belong together; None where they simply do.
        confidence: as of `Example`.
    """

    one_target: ClassVar[bool] = True

    parts: Sequence[Sequence[int]]
    row: int
    judge: Judge | None = None
    score: float | None = None
    confidence: float = 1.0

    @property
    def input_ids(self) -> Sequence[int]:  # type: ignore[override]
        """The longest text."""
        return max(self.lines, key=len)

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        return self.parts

    @property
    def texts(self) -> list[Sequence[int]]:
        return list(self.parts)

    @property
    def label_ids(self) -> Sequence[int]:
        """All texts, each with its length before it, and the score in millionths: what tells rows apart."""
        score = () if self.score is None else (round(self.score * 1e6),)
        return [number for text in self.lines for number in (len(text), *text)] + list(score)

    def supervised(self) -> int:
        """One: the query. None where one of the texts is empty."""
        return int(all(self.lines))

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """The number of each row's own passage among those of the batch, [B]."""
        return np.arange(len(lines))

    @staticmethod
    def extra(examples: Sequence[Related]) -> dict[str, Tensor]:
        """
        query_key_B: a hash of every query.
        passage_key_M: of every passage, column by column.
        row_M: the row in the batch that each passage belongs to.
        score_B: where rows have one.
        """
        most = max(len(each.lines) for each in examples)
        passages = [
            (row, each.lines[number])
            for number in range(1, most)
            for row, each in enumerate(examples)
            if len(each.lines) > number
        ]
        found = {
            "query_key_B": torch.tensor([_key(each.lines[0]) for each in examples]),
            "passage_key_M": torch.tensor([_key(text) for _, text in passages]),
            "row_M": torch.tensor([row for row, _ in passages]),
        }
        if examples[0].score is not None:
            found["score_B"] = torch.tensor([each.score for each in examples], dtype=torch.float32)
        return found

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        query, passage, *wrong = [decode(text) for text in self.lines]
        if self.score is not None:
            return [(f"{query}\n", False), (f"{passage}\n", False), (f"score {self.score:g}", True)]
        pieces = [("query: ", False), (f"{query}\n", False), ("passage: ", False), (passage, True)]
        return pieces + [(f"\nnot: {text}", False) for text in wrong]


def _key(text: Sequence[int]) -> int:
    """A number that tells texts apart, of 63 bits."""
    digest = hashlib.blake2b(array("i", text).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
