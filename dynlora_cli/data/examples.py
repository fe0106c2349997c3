"""One row as the model sees it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dynlora_cli.data.forms import Form

IGNORED = -100


@dataclass(slots=True)
class Example:
    """One row, ready for a model. Sequences are `array('i')`: four bytes a token.

    Args:
        input_ids: token ids; seq2seq-lm: what the encoder reads.
        labels: causal-lm: the token where it is trained, -100 elsewhere, not shifted. seq2seq-lm: what the decoder
            writes, of its own length. Classification: the class index.
        row: number of the row, counted from 0 over all sources of its list in the recipe.
        token_type_ids: classification of text pairs, where the tokenizer has them.
        decoded: the row is one of seq2seq-lm.
    """

    input_ids: Sequence[int]
    labels: Sequence[int] | int
    row: int
    token_type_ids: Sequence[int] | None = None
    decoded: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a model reads or writes."""
        return len(self.input_ids) + (0 if isinstance(self.labels, int) or not self.decoded else len(self.labels))

    @property
    def longest(self) -> int:
        """Tokens of the longest text of the row."""
        return max(len(self.input_ids), len(self.labels) if not isinstance(self.labels, int) else 0)

    def supervised(self) -> int:
        """Number of targets: tokens with a label but the first, which nothing precedes; 1 for a classifier.

        A decoder's first token is a target as well: its start token precedes it.
        """
        if isinstance(self.labels, int):
            return 1
        if self.decoded:
            return len(self.labels)
        return sum(label != IGNORED for label in itertools.islice(self.labels, 1, None))


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
    """

    ids: list[int]
    labels: list[int]
    prompt: str
    label: str | int | None = None
    types: list[int] | None = None
    cut: bool = False
    untaught: str = ""


@dataclass(frozen=True, slots=True)
class Located:
    """A row in its neutral form, and where it comes from (`data.jsonl:3`)."""

    place: str
    form: Form
