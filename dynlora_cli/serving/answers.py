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
from dynlora_cli.generation.parsed import OPEN, Parsed, Split, parse

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


class Parts:
    """A chat's answer in thoughts, words and calls.

    Args:
        request: its prompt.
        tools: names that may be called.
    """

    def __init__(self, request: Request, tools: tuple[str, ...]) -> None:
        self._tokenizer, self._tools = request.voice.tokenizer, tools
        self._stops = bool(request.sampling.stop_strings)
        self._opened = self._spelled(request.ids[-8:]).rstrip().endswith(OPEN)
        # What is a call is known at the end alone; so are thoughts of gpt-oss and Mistral, in special tokens.
        words = self._tokenizer.get_vocab()
        self._holds = bool(tools) or "<|channel|>" in words or "[THINK]" in words
        self._split = Split(opened=self._opened)
        self._parsed: Parsed | None = None
        self._calls = f"call_{uuid.uuid4().hex[:16]}"

    def _spelled(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def parsed(self, answer: Answer) -> Parsed:
        """The parts of the whole answer."""
        if self._parsed is None:
            raw = "" if self._stops else self._spelled(answer.ids)  # what is behind a stop is not there
            self._parsed = parse(answer.text, raw, opened=self._opened, tools=self._tools)
        return self._parsed

    def message(self, answer: Answer) -> dict[str, Any]:
        """The parts as fields of a message, with DeepSeek's and vLLM's name for thoughts."""
        found = self.parsed(answer)
        message: dict[str, Any] = {"content": found.content if found.content or not found.calls else None}
        if found.reasoning:
            message["reasoning_content"] = found.reasoning
        if found.calls:
            message["tool_calls"] = [
                {
                    "id": f"{self._calls}{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(found.calls)
            ]
        return message

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Pieces of a stream."""
        return [] if self._holds else [_piece(thought, piece) for thought, piece in self._split.feed(text)]

    def rest(self, answer: Answer) -> list[dict[str, Any]]:
        """The pieces that are left at the end."""
        if not self._holds:
            return [_piece(thought, piece) for thought, piece in self._split.close()]
        message = self.message(answer)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        order = ("reasoning_content", "content", "tool_calls")
        return [{name: message[name]} for name in order if message.get(name)]


def _piece(thought: bool, text: str) -> dict[str, Any]:
    return {"reasoning_content" if thought else "content": text}


@dataclass
class Reply:
    """An answer that is being put together.

    Args:
        shape: chat or text.
        asked: the model as the client names it.
        prompts: how many there are; each has `n` choices, one after the other.
        n: choices of each.
        tools: names that may be called.

    Attributes:
        model: who answers; of `auto`, whom the router has chosen.
        decision: of the router; None where nobody had to decide.
        answers: by the choice's number.
    """

    shape: Shape
    asked: str
    prompts: int
    n: int
    tools: tuple[str, ...] = ()
    answers: dict[int, Answer] = field(default_factory=dict)
    model: str = ""
    decision: dict[str, Any] | None = None
    _parts: dict[int, Parts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = self.model or self.asked

    def prepared(self, request: Request, number: int = 0) -> None:
        """Note who answers, and what its prompt has begun."""
        if self.shape.is_chat:
            self._parts[number] = Parts(request, self.tools)
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
            text: dict[str, Any] = {"text": answer.text}
            if self.shape.is_chat:
                text = {"message": {"role": "assistant", **self._parts[number].message(answer), "refusal": None}}
            reason = self._reason(number)
            choices.append({"index": number, **text, "logprobs": None, "finish_reason": reason})
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
        """Some text of a choice; empty where it is not yet known what it is."""
        if not self.shape.is_chat:
            return self._event([self._choice(number, {"text": text})])
        return self._deltas(number, self._parts[number].feed(text))

    def end(self, number: int) -> bytes:
        """A choice is complete."""
        answer, reason = self.answers[number], self._reason(number)
        if not self.shape.is_chat:
            return self._event([self._choice(number, {"text": ""}, reason)])
        left = self._deltas(number, self._parts[number].rest(answer))
        return left + self._event([self._choice(number, {"delta": {}}, reason)])

    def _deltas(self, number: int, deltas: Sequence[Mapping[str, Any]]) -> bytes:
        return b"".join(self._event([self._choice(number, {"delta": delta})]) for delta in deltas)

    def _reason(self, number: int) -> str:
        """Why a choice has ended; calls are a reason of their own."""
        answer = self.answers[number]
        calls = self.shape.is_chat and answer.finish_reason == "stop" and self._parts[number].parsed(answer).calls
        return "tool_calls" if calls else answer.finish_reason

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
