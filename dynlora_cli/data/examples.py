"""One row as the model sees it.

    OneText      read and continued: tokens, and the token to be learned at each place
    TwoTexts     one text to be read by an encoder, another to be written by a decoder
    Classified   a text and the number of its class

A task uses one of these, or brings a class of its own that is derived from `Example`: nobody else asks which it is.

Dimensions: B rows of a batch, T tokens of the longest, N targets.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.forms import Form

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100

Targets = NDArray[np.int64]
Lines = Sequence[Sequence[tuple[int, Any]]]  # of each line of a batch: its examples, each with its first position


class Judge(ABC):
    """What says how good a model is on a batch, where that is not the cross-entropy of tokens or classes.

    A class of examples brings it along, and its batches (data/batches.py) hand it on. So whoever asks for a loss, to
    train on, to prune by or to measure, gets the right one without knowing which it is.
    """

    @abstractmethod
    def judged(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For every target [N]: its loss (fp32), the model's choice, the right one, and its row in the batch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The same, summed over the targets: a scalar in fp32, to train on."""
        return self.judged(model, batch)[0].sum()

    def numbers(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """For every row [B], by name: its `loss`, and what is told beside it; NaN where a row has none of it.

        Empty where there is no more to tell than `judged` says. All processes ask together, as the model may wait.
        """
        return {}

    def tally(self) -> Tally:
        """What is told of many batches beside their loss: a new one for each set of rows."""
        return Tally(self)


class Tally:
    """Judges batch by batch, and has numbers over all of them at the end.

    Args:
        judge: of the batches.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def judged(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of `Judge`."""
        return self.judge.judged(model, batch)

    def numbers(self) -> dict[str, float]:
        """Beside the loss, over all rows that were judged; by default none."""
        return {}


class Example(ABC):
    """One row, ready for a model. Sequences of tokens are `array('i')`: four bytes a token.

    Attributes:
        input_ids: tokens that the model reads.
        row: number of the row, counted from 0 over all sources of its list in the recipe.
        confidence: how sure its data are of it, from 0 to 1; for `pruning.policy: retrieval`.
        description: what its task is, in words, for a network that writes an adapter from them; "": nobody says.
        wordings: all descriptions that it may have, of which each pass draws one; of a row that is trained on.
        packs: several of these can stand in one line of a batch.
        one_target: its tokens carry labels, and it is a single target all the same.
        renewed: every pass draws anew what is learned of it (`in_pass`), so a single row is something to learn from.
        judge: says how good a model is on a batch of these; None: the cross-entropy of their targets.
    """

    __slots__ = ()
    input_ids: Sequence[int]
    row: int
    confidence: float = 1.0
    description: str = ""
    wordings: Sequence[str] = ()
    packs: ClassVar[bool] = False
    one_target: ClassVar[bool] = False
    renewed: ClassVar[bool] = False
    judge: Judge | None = None

    @property
    @abstractmethod
    def label_ids(self) -> Sequence[int]:
        """What is to be learned, as numbers."""

    @property
    def texts(self) -> list[Sequence[int]]:
        """The texts of the row, as tokens that a model reads or writes."""
        return [self.input_ids]

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        """What the model reads of the row: each a line of a batch. Those of kinds that pack have one."""
        return [self.input_ids]

    @property
    def tokens(self) -> int:
        """Number of tokens that a model reads or writes."""
        return sum(len(text) for text in self.texts)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest text."""
        return max(len(text) for text in self.texts)

    @property
    def token_types(self) -> Sequence[int] | None:
        """Which of two texts each token of `input_ids` belongs to, for models that are told so."""
        return None

    def in_pass(self, seed: int, epoch: int) -> Example:  # noqa: ARG002
        """The row as it is when it comes up, by the run's seed and how often it did before; most stay the same."""
        return self

    def line_keys(self) -> list[bytes]:
        """Of each of its lines: what it is known by, in whichever list of rows; where a judge remembers lines."""
        return []

    @abstractmethod
    def supervised(self) -> int:
        """Number of targets."""

    @staticmethod
    @abstractmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:
        """The targets of a batch: [B, T], aligned with the logits, -100 where there is none; or one for each row, [B].

        Args:
            lines: of the batch; where its rows have several, one for each row.
            width: of the batch's `input_ids`.
            even: the width to be taken for so many tokens, for targets that are not as wide as `input_ids`.
        """

    @staticmethod
    def extra(examples: Sequence[Any]) -> dict[str, Tensor]:  # noqa: ARG004
        """What the `judge` has to know of a batch of these, beside its labels; tensors by name."""
        return {}

    @abstractmethod
    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:
        """The example as text in pieces, each with whether it is in the loss.

        Args:
            decode: makes text of tokens.
            classes: their names, where the task has any.
        """

    def last_answer(self) -> tuple[Sequence[int], list[int]]:
        """The last text that is to be written, and all that stands before it; both empty where nothing does."""
        return (), []

    @property
    def is_right(self) -> bool:
        """Whether its last answer is one that a model should give."""
        return True


@dataclass(slots=True)
class OneText(Example):
    """A text that a causal language model reads and continues.

    Args:
        input_ids: its tokens.
        labels: as long: the token where it is trained, -100 elsewhere, not shifted.
        row, confidence, description, wordings: as of `Example`.
    """

    packs: ClassVar[bool] = True

    input_ids: Sequence[int]
    labels: Sequence[int]
    row: int
    confidence: float = 1.0
    description: str = ""
    wordings: Sequence[str] = ()

    @property
    def label_ids(self) -> Sequence[int]:
        return self.labels

    def supervised(self) -> int:
        """Tokens with a label but the first, which nothing precedes."""
        return sum(label != IGNORED for label in itertools.islice(self.labels, 1, None))

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """[B, T]: at each token the one after it."""
        targets = np.full((len(lines), width), IGNORED)
        for line, placed in enumerate(lines):
            for start, example in placed:
                targets[line, start : start + len(example.labels) - 1] = example.labels[1:]
        return targets

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        ids = list(self.input_ids)
        pieces, shown, end = [], "", 0
        for flag, run in itertools.groupby(label != IGNORED for label in self.labels):
            end += len(list(run))
            text = decode(ids[:end])
            if end < len(ids):
                text = text.rstrip("\ufffd")  # a character whose bytes go on in the next piece is shown there
            pieces.append((text[len(shown) :], flag))
            shown = text
        return pieces

    def last_answer(self) -> tuple[Sequence[int], list[int]]:
        """The last run of supervised tokens; both empty where the first token is supervised."""
        supervised = [label != IGNORED for label in self.labels]
        if supervised[0]:
            return (), []
        end = max(place for place, flag in enumerate(supervised) if flag) + 1
        start = end
        while supervised[start - 1]:
            start -= 1
        return self.input_ids[:start], list(self.input_ids[start:end])


@dataclass(slots=True)
class TwoTexts(Example):
    """A text that an encoder reads, and another that a decoder writes.

    Args:
        input_ids: tokens of the first.
        labels: tokens of the second. All are targets: a start token precedes the first of them.
        row, confidence: as of `Example`.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    row: int
    confidence: float = 1.0

    @property
    def label_ids(self) -> Sequence[int]:
        return self.labels

    @property
    def texts(self) -> list[Sequence[int]]:
        return [self.input_ids, self.labels]

    def supervised(self) -> int:
        """All tokens of the second text."""
        return len(self.labels)

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """[B, T] with T of the longest second text."""
        written = [placed[0][1].labels for placed in lines]
        targets = np.full((len(lines), even(max(map(len, written)))), IGNORED)
        for line, labels in enumerate(written):
            targets[line, : len(labels)] = labels
        return targets

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        return [(decode(self.input_ids), False), (decode(self.labels), True)]

    def last_answer(self) -> tuple[Sequence[int], list[int]]:
        """The second text, and the first."""
        return self.input_ids, list(self.labels)


@dataclass(slots=True)
class Classified(Example):
    """A text, or a pair of texts, and its class.

    Args:
        input_ids: tokens of all of it.
        label: number of the class, from 0, in the order of the model's outputs.
        row: as of `Example`.
        token_types: of a pair, where the tokenizer has them.
        confidence: as of `Example`.
    """

    input_ids: Sequence[int]
    label: int
    row: int
    token_types: Sequence[int] | None = None
    confidence: float = 1.0

    @property
    def label_ids(self) -> Sequence[int]:
        return [self.label]

    def supervised(self) -> int:
        """One."""
        return 1

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """[B]"""
        return np.array([placed[0][1].label for placed in lines])

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:
        name = classes[self.label] if classes else str(self.label)
        return [(decode(self.input_ids), False), ("  class: ", False), (name, True)]


@dataclass(slots=True)
class Draft:
    """Tokens and labels of one row before it is cut to length.

    Args:
        ids: token ids.
        labels: as long as `ids`; empty for a classifier; a decoder's are a text of their own.
        prompt: rows with the same prompt belong on the same side of a split.
        label: the class, for a classifier.
        types: token type ids, for a classifier of text pairs.
        untaught: why nothing in it is trained, where that is known before it is cut.
        cut: the row was too long and has lost its end.
        confidence: as of `Example`.
        located: the row that it was made of, where passages are still to come into it.
        other: the second line of a row of compared answers.
        start: tokens of the prompt, where two lines have the same one.
        picture: of a row that has one.
        others: texts that are not read as one, of a row that is several lines of a batch; `lines`: their tokens.
        score: how well two texts belong together.
    """

    ids: list[int]
    labels: list[int]
    prompt: str
    label: str | int | None = None
    types: list[int] | None = None
    cut: bool = False
    untaught: str = ""
    confidence: float = 1.0
    located: Located | None = None
    others: Sequence[str] = ()
    lines: Sequence[Sequence[int]] = ()
    score: float | None = None
    other: list[int] | None = None
    start: int = 0
    picture: Any = None

    def overflows(self, limit: int) -> bool:
        """Whether it is longer than so many tokens."""
        return self.cut or max(len(self.ids), len(self.labels), len(self.other or ())) > limit

    def loses_answer(self, limit: int) -> bool:
        """Whether the end of an answer stands behind so many tokens."""
        return any(label != IGNORED for label in self.labels[limit:]) or len(self.other or ()) > limit


@dataclass(frozen=True, slots=True)
class Located:
    """A row in its neutral form, and where it comes from (`data.jsonl:3`).

    Args:
        place: in words.
        form: what is learned.
        confidence: how sure its data are of the row, from 0 to 1; None: they do not say.
        passage: id of the passage that answers it, where its data name one; for `dataset.retrieve`.
        home: the folder of the file that it stands in, from which paths in it count; None: it is in no file.
    """

    place: str
    form: Form
    confidence: float | None = None
    passage: str | None = None
    home: Path | None = None
