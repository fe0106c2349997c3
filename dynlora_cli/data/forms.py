"""The neutral forms between a row of data and tokens, and the checks that every format needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True, slots=True)
class Told:
    """What the recipe, a source or a row says of how a conversation is written.

    Args:
        kwargs: further variables of the chat template, such as `enable_thinking`.
        reasoning: the assistant's reasoning is kept (trained), masked (read, not trained), or dropped (not there).
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str = "keep"


PLAINLY = Told()


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation, rendered by the tokenizer's chat template; `tools` go to the template as they are.

    Args:
        messages: each with role and content, both text.
        tools: as the template takes them.
        untrained: numbers of assistant messages, from 0, that are marked not to train.
        marks_others: a message of another role is marked to train.
        remarks: what the person should know about how the row was read.
        told: how it is written.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    marks_others: bool = False
    remarks: tuple[str, ...] = ()
    told: Told = PLAINLY

    @property
    def is_empty(self) -> bool:
        """Whether an answer that trains has no words, and no key beside that a template could write."""
        answers = (
            message
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and number not in self.untrained
        )
        return any(not any(value for key, value in answer.items() if key != "role") for answer in answers)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the text that continues it; nothing is put between them."""

    prompt: str
    completion: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not self.completion

    @property
    def runs_on(self) -> bool:
        """Whether a word of the completion follows the prompt without a space (scripts that use spaces)."""
        start = self.completion[:1]
        return bool(self.prompt) and not self.prompt[-1].isspace() and start.isascii() and start.isalnum()

    def apart(self, separator: str) -> Pair:
        """The pair with a separator behind its prompt, unless that ends in white space already."""
        return self if self.prompt[-1:].isspace() else Pair(self.prompt + separator, self.completion)


@dataclass(frozen=True, slots=True)
class Plain:
    """A text to continue from its first token."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and its class."""

    text: str
    text_pair: str | None
    label: str | int


Said = str | list[dict[str, Any]]  # a text, or messages, each with role and content


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two answers, of which one is preferred. All three are texts, or all three lists of messages.

    Args:
        prompt: what both answers follow; empty where they share no beginning.
        chosen: the better answer.
        rejected: the other one.
        tools, told: for the chat template, as of `Turns`.
        remarks: what the person should know about how the row was read.
    """

    prompt: Said
    chosen: Said
    rejected: Said
    tools: list[Any] | None = None
    remarks: tuple[str, ...] = ()
    told: Told = PLAINLY

    @property
    def untaught(self) -> str:
        """Why nothing is to be learned from it, to follow after `3 rows`; empty where something is."""
        if says_nothing(self.chosen) or says_nothing(self.rejected):
            return "with an empty chosen or rejected answer"
        return "whose chosen and rejected answers are the same" if self.chosen == self.rejected else ""


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt and an answer, which is good or not. Both are texts, or both lists of messages.

    Args:
        prompt: what the answer follows.
        completion: the answer.
        label: it is good.
        tools, remarks, told: as of `Preference`.
    """

    prompt: Said
    completion: Said
    label: bool
    tools: list[Any] | None = None
    remarks: tuple[str, ...] = ()
    told: Told = PLAINLY

    @property
    def untaught(self) -> str:
        """As of `Preference`."""
        return "with an empty answer" if says_nothing(self.completion) else ""


def says_nothing(answer: Said) -> bool:
    """Whether an answer has no words, and no key beside that a template could write."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(value for message in answer for key, value in message.items() if key != "role")


PREFERRING = {Preference.__name__, Judged.__name__}  # forms of answers that are compared or judged


@dataclass(frozen=True, slots=True)
class Related:
    """A query, a passage that answers it, and passages that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Graded:
    """Two texts, and how well they belong together."""

    first: str
    second: str
    score: float


@dataclass(frozen=True, slots=True)
class Grounded:
    """A question that is about a text, and its answer. The text is for a teacher, or for whoever writes an adapter.

    Args:
        context: the text; empty where the question is about none.
        said: question and answer without it.
    """

    context: str
    said: Turns | Pair


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture and what it shows.

    Args:
        image: the path of its file, from the folder of the file of rows, or the content of such a file.
        caption: what it shows; None where the row does not say.
    """

    image: str | bytes
    caption: str | None


WITH_TURNS = {Turns.__name__, *PREFERRING, Grounded.__name__}  # forms that a chat template writes
Form = Turns | Pair | Plain | Labelled | Preference | Judged | Related | Graded | Grounded | Captioned


class BadRowError(ValueError):
    """A row does not fit its format; whoever knows the file and the row number turns this into a DataError."""


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column that must be there. A number is its digits, as in a CSV, where all is text.

    Raises:
        BadRowError: the column is missing, null, or holds something other than text.
    """
    if column not in row:
        raise BadRowError(f"column {column!r} is missing")
    value = as_text(row[column])
    if not isinstance(value, str):
        raise BadRowError(f"column {column!r} is {_kind(value)}, expected text")
    return value


def first_answer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the first of several right answers as its completion, where that is a list of texts."""
    answers = row.get("completion")
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        return {**row, "completion": answers[0]}
    return row


def as_text(value: object) -> object:
    """A number as its digits, and anything else as it is; no number (NaN) is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else value


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """The text in a column that may be absent or null, which both count as empty."""
    return "" if row.get(column) is None else text_of(row, column)


def refuse_half_characters(value: object) -> None:
    """Refuse text, in whatever lists and objects, that no tokenizer can read.

    JSON writes a character outside the basic plane as two escapes; a text cut between them keeps half of it.

    Raises:
        BadRowError: half a character.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise BadRowError(f"a text holds half a character, {half} without its other half") from None
    elif isinstance(value, Mapping):
        refuse_half_characters([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            refuse_half_characters(part)


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def name_of(form: ModuleType) -> str:
    """A format's name in a recipe."""
    return form.__name__.rpartition(".")[2]
