"""Answers in OpenAI's form, whole and in pieces. What is ours stands under `dynlora`, and in headers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dynlora_cli.config.mix import AUTO, mix_text

if TYPE_CHECKING:
    from dynlora_cli.generation.engine import Answer, Request

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """How chats and texts differ.

    Attributes:
        prefix: of the answer's id.
        kind: of a whole answer.
        piece_kind: of a piece of a stream.
        is_chat: whether a choice holds a message.
    """

    prefix: str
    kind: str
    piece_kind: str
    is_chat: bool


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", True)
TEXT = Shape("cmpl", "text_completion", "text_completion", False)


@dataclass
class Reply:
    """An answer that is being put together.

    Args:
        shape: chat or text.
        asked: the model as the client names it.
        prompts: how many there are; each has `n` choices, one after the other.
        n: choices of each.

    Attributes:
        model: who answers; of `auto`, whom the router has chosen.
        decision: of the router; None where nobody had to decide.
        answers: by the choice's number.
    """

    shape: Shape
    asked: str
    prompts: int
    n: int
    answers: dict[int, Answer] = field(default_factory=dict)
    model: str = ""
    decision: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = self.model or self.asked

    def prepared(self, request: Request) -> None:
        """Note who answers."""
        if self.asked != AUTO:
            return
        mix = None if request.by_token else mix_text(request.mix)
        self.model = mix or AUTO
        self.decision = {"use": AUTO, "router": request.router, "mix": mix}
        if request.decision is not None:
            # Not the key that decided: that is a text somebody else has trained on.
            confidence = {name: round(float(value), 6) for name, value in request.decision.confidence.items()}
            self.decision |= {"reason": request.decision.reason, "confidence": confidence}

    @property
    def headers(self) -> dict[str, str]:
        """The decision, for clients that see no more than OpenAI's fields."""
        if self.decision is None:
            return {}
        mix, router = self.decision["mix"], quote(str(self.decision["router"]), safe="")
        return {"x-dynlora-router": router} | ({"x-dynlora-mix": quote(mix, safe="*+-. ")} if mix else {})

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, those of a prompt counted once for all its choices."""
        prompt = sum(self.answers[number].prompt_tokens for number in sorted(self.answers) if number % self.n == 0)
        written = sum(len(answer.ids) for answer in self.answers.values())
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def whole(self) -> dict[str, Any]:
        """All of it."""
        choices = []
        for number, answer in sorted(self.answers.items()):
            text: dict[str, Any] = (
                {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
                if self.shape.is_chat
                else {"text": answer.text}
            )
            choices.append({"index": number, **text, "logprobs": None, "finish_reason": answer.finish_reason})
        return {**self._head(self.shape.kind), "choices": choices, "usage": self.usage}

    # -- in pieces ---------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The first events of a stream: who answers, one event for each choice."""
        if not self.shape.is_chat:
            return b""
        return b"".join(
            self._event([self._choice(number, {"delta": {"role": "assistant", "content": ""}})])
            for number in range(self.prompts * self.n)
        )

    def piece(self, number: int, text: str) -> bytes:
        """Some text of a choice."""
        return self._event(
            [self._choice(number, {"delta": {"content": text}} if self.shape.is_chat else {"text": text})]
        )

    def end(self, number: int) -> bytes:
        """A choice is complete."""
        reason = self.answers[number].finish_reason
        return self._event([self._choice(number, {"delta": {}} if self.shape.is_chat else {"text": ""}, reason)])

    def closing(self, *, with_usage: bool) -> bytes:
        """The end of a stream."""
        return (self._event([], {"usage": self.usage}) if with_usage else b"") + DONE

    def _choice(self, number: int, text: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": number, **text, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: Sequence[Mapping[str, Any]], more: Mapping[str, Any] | None = None) -> bytes:
        return event({**self._head(self.shape.piece_kind), "choices": choices, **(more or {})})

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head if self.decision is None else head | {"dynlora": self.decision}


def event(data: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def model_card(name: str, root: str | None, parent: str | None, created: int, length: int | None) -> dict[str, Any]:
    """A model as `/v1/models` lists it, with vLLM's fields."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "dynlora", "root": root, "parent": parent}
    return card if length is None else card | {"max_model_len": length}
