"""What is asked of an engine, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Reason, Row, Written
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.voice import Messages, Voice
from dynlora_cli.library.activation import Decision


@dataclass(frozen=True)
class Use:
    """What is to speak.

    Attributes:
        text: as a person writes it.
        mix: weights by adapter; {} is the base. None: a router decides on each request.
    """

    text: str
    mix: Mapping[str, float] | None

    @property
    def auto(self) -> bool:
        """Whether a router decides."""
        return self.mix is None


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, and who answers it.

    Attributes:
        ids: the prompt.
        use: what was asked for.
        mix: what speaks: weights by adapter, {} is the base. Where a router decides by token: those that may speak.
        sampling: how the answer is written.
        ends: tokens at which it ends.
        voice: whose form the prompt has.
        continues: the answer goes on in the middle of a text, so that a space before it is part of it.
        router: that decided, by name; None where nobody had to.
        decision: of that router.
        state: of an answer that was paused, to go on with; set it by `dataclasses.replace`.
    """

    ids: tuple[int, ...]
    use: Use
    mix: Mapping[str, float]
    sampling: Sampling
    ends: frozenset[int]
    voice: Voice
    continues: bool = False
    router: str | None = None
    decision: Decision | None = None
    state: Row | None = None

    @property
    def by_token(self) -> bool:
        """Whether a router decides on every token."""
        return self.decision is not None and self.decision.by_token


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        text: without special tokens, up to a stop string.
        ids: its tokens, without the one that ended it.
        prompt_tokens: how long the prompt was.
        finish_reason: stop, length, cancelled, failed (NaN) or paused.
        mix: what spoke; as of the request.
        decision: of the router, where one decided.
        state: of a paused answer: a request with it goes on exactly there, and its answer holds all from the start.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Reason
    mix: Mapping[str, float]
    decision: Decision | None = None
    state: Row | None = None


def answer_of(request: Request, written: Written) -> Answer:
    """What was written, with who wrote it."""
    return Answer(
        written.text,
        written.ids,
        written.prompt_tokens,
        written.finish_reason,
        request.mix,
        request.decision,
        written.row,
    )


def question_of(messages: Messages) -> str:
    """What the person asks: the last turn of theirs."""
    theirs = [message for message in messages if message.get("role") == "user"]
    return said_in(theirs[-1].get("content")) if theirs else ""


def said_in(content: Any) -> str:
    """What a message says, also where it comes in parts.

    Raises:
        UsageError: it is something else than text.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    found = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(parts):
        raise UsageError("the prompt is no text", "give text alone")
    return "".join(texts)
