"""Rows with a context, to tokens: what is trained reads the prompt alone, a teacher reads the context before it."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.examples import IGNORED, Draft, Example, Located, OneText
from dynlora_cli.data.forms import Grounded, Pair, Turns
from dynlora_cli.data.splits import UNREAD
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = "{context}\n\n{prompt}"
_PLACES = ("{context}", "{prompt}")


@dataclass(slots=True)
class GroundedText(OneText):
    """A prompt and its answer, and beside them the text that they are about.

    Args:
        input_ids, labels, row, confidence: as of `OneText`: the prompt and the answer, without the context.
        context_ids: tokens of the context alone, without special tokens.
        teacher_ids: tokens before the answer where the context stands in the prompt.
    """

    context_ids: Sequence[int] = ()
    teacher_ids: Sequence[int] = ()

    @property
    def label_ids(self) -> Sequence[int]:
        return [*self.labels, IGNORED, *self.context_ids, IGNORED, *self.teacher_ids]

    def lesson(self) -> OneText:
        """What a teacher reads: the context, the prompt and this answer. Its targets are those of the row, in order."""
        start = _answer(self.labels)
        ids = array("i", [*self.teacher_ids, *self.input_ids[start:]])
        labels = array("i", [*[IGNORED] * len(self.teacher_ids), *self.labels[start:]])
        if start == 0:  # the row's first token is no target, since nothing precedes it there
            labels[len(self.teacher_ids)] = IGNORED
        return OneText(ids, labels, self.row)

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:
        pieces = OneText.shown(self, decode, classes)
        return [*pieces, ("\n  before the same answer, the teacher reads: ", False), (decode(self.teacher_ids), False)]


class GroundedEncoder(TextEncoder):
    """Encodes rows with a context.

    Args:
        tokenizer, train_on, max_length: as of `Encoder`; no context counts for `max_length`.
        layout: how context and prompt stand in what the teacher is asked, with `{context}` and `{prompt}`, each once.

    Raises:
        UsageError: one of the two is not there.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int, *, layout: str = LAYOUT
    ) -> None:
        refuse_layout(layout)
        super().__init__(tokenizer, train_on, max_length)
        self.layout = layout
        self._contexts: dict[str, Sequence[int]] = {}  # many rows have one

    def apart(self, row: Located) -> list[Located]:
        form = row.form
        assert isinstance(form, Grounded)
        parts = super().apart(replace(row, form=form.said))
        return [replace(part, form=Grounded(form.context, part.form)) for part in parts]  # type: ignore[arg-type]

    def encode(self, rows: list[Located]) -> list[Draft]:
        forms = [row.form for row in rows if isinstance(row.form, Grounded)]
        drafts = super().encode([replace(row, form=form.said) for row, form in zip(rows, forms, strict=True)])
        taught = super().encode(
            [replace(row, form=self._with(row.place, form)) for row, form in zip(rows, forms, strict=True)]
        )
        for form, draft, teacher in zip(forms, drafts, taught, strict=True):
            before = teacher.ids[: _answer(teacher.labels)]
            draft.lines = [self.context(form.context), before]
            draft.prompt = f"{form.context}\n{draft.prompt}"  # the same question of another text is another prompt
            said = min(len(draft.ids), self.max_length) - _answer(draft.labels)
            if self.reads is not None and len(before) + said > self.reads:
                draft.untaught = draft.untaught or f"{UNREAD}, {counted(self.reads, 'token')}"
        return drafts

    def example(self, draft: Draft, row: int) -> Example:
        plain = super().example(draft, row)
        assert isinstance(plain, OneText)
        context, before = draft.lines
        ids, labels = plain.input_ids, plain.labels
        before = array("i", before)
        return GroundedText(ids, labels, row, draft.confidence, context_ids=context, teacher_ids=before)

    def context(self, text: str) -> Sequence[int]:
        """Tokens of a context alone."""
        if text not in self._contexts:
            self._contexts[text] = array("i", self._ids([text])[0])
        return self._contexts[text]

    def _with(self, place: str, form: Grounded) -> Turns | Pair:
        """The row with its context before its prompt, or before what the user says last before the answer.

        Raises:
            DataError: the user says nothing.
        """
        if not form.context:
            return form.said
        if isinstance(form.said, Pair):
            return replace(form.said, prompt=in_layout(self.layout, form.context, form.said.prompt))
        messages, roles = list(form.said.messages), [message["role"] for message in form.said.messages]
        trained = (
            number for number, role in enumerate(roles) if role == "assistant" and number not in form.said.untrained
        )
        end = next(trained, len(roles))
        if "user" not in roles[:end]:
            raise DataError(
                f"{place}: no turn of the user before the answer, so there is no place for the context",
                "begin the prompt with a turn of the role user",
            )
        last = max(number for number in range(end) if roles[number] == "user")
        messages[last] = {**messages[last], "content": in_layout(self.layout, form.context, messages[last]["content"])}
        return replace(form.said, messages=messages)


def refuse_layout(layout: str) -> None:
    """Check that a layout has a place for the context and one for the prompt.

    Raises:
        UsageError: one of the two is not there, or twice.
    """
    if any(layout.count(place) != 1 for place in _PLACES):
        raise UsageError(
            f"train.context_layout: must hold {' and '.join(_PLACES)}, each once; got {layout!r}",
            "leave it out for the context, an empty line and the prompt",
        )


def in_layout(layout: str, context: str, prompt: str) -> str:
    """What a teacher is asked: a context and a prompt, as the layout puts them together; no context: the prompt."""
    filled = dict(zip(_PLACES, (context, prompt), strict=True))
    pieces = re.split(r"(\{context\}|\{prompt\})", layout)
    return "".join(filled.get(piece, piece) for piece in pieces) if context else prompt


def _answer(labels: Sequence[int]) -> int:
    """Where the first token stands that is trained; behind all where none is."""
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
