"""Rows of one text each as columns: what a store holds of them.

A token that trains is stored as it is, any other as its complement (-1 - token): one number has both the token and
whether it carries a label. R rows of N tokens in all.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.examples import IGNORED, OneText
from dynlora_cli.data.rows.kept import PROMPT, Kept, prompts_of

TOKENS = "tokens"
TRUNCATED, CUT = 1, 2  # bits of `marks`
COLUMNS: dict[str, str] = {
    TOKENS: "<i4",
    "lengths": "<i4",
    "ends": "<i8",  # of the tokens of a row, in their column
    "supervised": "<i4",
    "numbers": "<i8",
    "prompts": PROMPT,
    "marks": "u1",
    "confidences": "<f8",
    "checks": "<u4",  # of the tokens of a row: nobody reads them all before they are needed
}


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows that stand beside each other, as columns by name: tokens [N], the others [R]."""

    columns: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["lengths"])

    @classmethod
    def of(cls, rows: Sequence[Kept]) -> Block:
        """Rows as columns.

        Raises:
            ValueError: a label is neither its token nor none; no encoder of ours makes such rows.
        """
        signed = [_signed(row.example) for row in rows]
        found: dict[str, Any] = {
            TOKENS: np.concatenate([np.zeros(0, np.int32), *signed]),
            "lengths": [len(each) for each in signed],
            "ends": np.cumsum([len(each) for each in signed]),
            "supervised": [int((each[1:] >= 0).sum()) for each in signed],
            "numbers": [row.example.row for row in rows],
            "prompts": prompts_of(row.prompt for row in rows),
            "marks": [TRUNCATED * row.truncated + CUT * row.cut_answer for row in rows],
            "confidences": [row.example.confidence for row in rows],
            "checks": [zlib.crc32(each.tobytes()) for each in signed],
        }
        return cls({name: np.asarray(found[name], kind) for name, kind in COLUMNS.items()})

    def moved(self, column: str, more: int) -> Block:
        """The same rows with numbers in one column that are so much higher."""
        return replace(self, columns=self.columns | {column: self.columns[column] + more})


def _signed(example: Any) -> NDArray[np.int32]:
    ids, labels = np.asarray(example.input_ids, np.int32), np.asarray(example.labels, np.int32)
    trains = labels != IGNORED
    if type(example) is not OneText or (labels[trains] != ids[trains]).any() or len(ids) != len(labels):
        raise ValueError(f"row {example.row} cannot be stored: its labels are not its tokens")
    return np.where(trains, ids, ~ids).astype("<i4")


def example_of(signed: NDArray[np.int32], row: int, confidence: float) -> OneText:
    """A row as it was before it was stored."""
    trains = signed >= 0
    ids, labels = array("i"), array("i")
    ids.frombytes(np.where(trains, signed, ~signed).astype(np.int32).tobytes())
    labels.frombytes(np.where(trains, signed, IGNORED).astype(np.int32).tobytes())
    return OneText(ids, labels, row, confidence)
