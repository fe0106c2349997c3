"""Examples of answers that are compared or judged (`train.objective`: dpo, orpo, kto).

    Compared   two answers to one prompt, of which one is preferred
    Rated      one answer, which is good or not

Each is two lines of a batch, so a batch has the first lines of all its rows, and below them the second ones. The
targets are the tokens of the answers. What a row counts for is one, however long its answers are.

Dimensions: B rows of a batch, T tokens of its longest line.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynlora_cli.data.examples import IGNORED, Example, Judge, Lines, Targets

if TYPE_CHECKING:
    from torch import Tensor


class TwoLines(Example):
    """A row of two texts that begin with the same prompt.

    Attributes:
        start: tokens of the prompt; the answers stand behind it.
    """

    __slots__ = ()
    one_target: ClassVar[bool] = True
    start: int

    @property
    def texts(self) -> list[Sequence[int]]:
        return list(self.lines)

    @property
    def answers(self) -> list[Sequence[int]]:
        """The lines without their prompt."""
        return [line[self.start :] for line in self.lines]

    @property
    def label_ids(self) -> Sequence[int]:
        first, second = self.answers
        return [*first, IGNORED, *second]

    def line_keys(self) -> list[bytes]:
        """Of each line: what it is known by, whichever row or list of rows it stands in."""
        place = b"%d " % self.start
        return [hashlib.blake2b(place + array("i", line).tobytes(), digest_size=16).digest() for line in self.lines]

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """[2 B, T]: at each token the one after it, where that belongs to an answer."""
        rows = [placed[0][1] for placed in lines]
        targets = np.full((2 * len(rows), width), IGNORED)
        for number, row in enumerate(rows):
            for column, line in enumerate(row.lines):
                begins = max(1, row.start)  # nothing precedes the first token of all
                targets[column * len(rows) + number, begins - 1 : len(line) - 1] = line[begins:]
        return targets

    def last_answer(self) -> tuple[Sequence[int], list[int]]:
        """The answer in the first line, and the prompt; both empty where there is no prompt."""
        line = self.lines[0]
        return (line[: self.start], list(line[self.start :])) if self.start else ((), [])


@dataclass(slots=True)
class Compared(TwoLines):
    """Two answers to one prompt.

    Args:
        input_ids: tokens of the prompt and of the answer that is preferred.
        rejected_ids: tokens of the prompt and of the other one.
        start: tokens of the prompt, the same ones in both.
        row, confidence: as of `Example`.
        judge: the objective that is trained for, or measured by.
    """

    input_ids: Sequence[int]
    rejected_ids: Sequence[int]
    start: int
    row: int
    confidence: float = 1.0
    judge: Judge | None = None

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        return [self.input_ids, self.rejected_ids]

    def supervised(self) -> int:
        """One, if there are two answers and they differ."""
        return int(all(map(len, self.answers)) and self.input_ids != self.rejected_ids)

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        chosen, rejected = map(decode, self.answers)
        told = [("\n  chosen: ", False), (chosen, True), ("\n  rejected: ", False), (rejected, True)]
        return [(decode(self.input_ids[: self.start]), False), *told]


@dataclass(slots=True)
class Rated(TwoLines):
    """An answer that is good or not.

    Args:
        input_ids: tokens of the prompt and of the answer.
        start: tokens of the prompt.
        desirable: the answer is good.
        row, confidence: as of `Example`.
        other_ids: the same prompt with the answer to another one, see `mismatch`.
        judge: as of `Compared`.
    """

    input_ids: Sequence[int]
    start: int
    desirable: bool
    row: int
    confidence: float = 1.0
    other_ids: Sequence[int] = ()
    judge: Judge | None = None

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        return [self.input_ids, self.other_ids or self.input_ids]

    @property
    def label_ids(self) -> Sequence[int]:
        return [*TwoLines.label_ids.fget(self), int(self.desirable)]  # type: ignore[attr-defined]  # a property

    def supervised(self) -> int:
        """One, if there is an answer."""
        return int(len(self.input_ids) > self.start)

    @property
    def is_right(self) -> bool:
        return self.desirable

    @staticmethod
    def extra(examples: Sequence[Any]) -> dict[str, Tensor]:
        """desirable_B: whether each answer is good, bool."""
        import torch

        return {"desirable_B": torch.tensor([example.desirable for example in examples])}

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        word = "a good answer" if self.desirable else "a bad answer"
        prompt, answer = decode(self.input_ids[: self.start]), decode(self.input_ids[self.start :])
        return [(prompt, False), (f"\n  {word}: ", False), (answer, True)]


def mismatch(examples: Sequence[Example], prompts: Sequence[bytes], max_length: int) -> None:
    """Give each rated row the answer of the row before it, whose prompt is another one; the first one that of the last.

    How likely such answers are tells how far a model has moved as a whole (KTO's reference point). Source: Ethayarajh
    et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024, section 4.1; the rotation is TRL's.

    Args:
        examples: of one list, in order; other kinds are left as they are.
        prompts: what the prompt of each is known by.
        max_length: tokens of the longest line.
    """
    rated = [(row, prompt) for row, prompt in zip(examples, prompts, strict=True) if isinstance(row, Rated)]
    for number, (row, prompt) in enumerate(rated):
        # Rows of one prompt stand beside each other where pairs were taken apart: a few steps back are enough.
        before = (rated[number - back] for back in range(1, min(len(rated), 64)))
        other = next((each for each, asked in before if asked != prompt), rated[number - 1][0])
        line = [*row.input_ids[: row.start], *other.input_ids[other.start :]]
        row.other_ids = array("i", line[:max_length])
