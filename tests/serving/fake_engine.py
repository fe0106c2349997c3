"""An engine without a model, with the real one's face: it answers `NAME says: w0 w1 w2 ...`, a word for a token."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora_cli.config.mix import AUTO, mix_text, parse_mix
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError


@dataclass(frozen=True)
class FakeUse:
    text: str
    mix: dict[str, float] | None


@dataclass(frozen=True)
class FakeDecision:
    confidence: dict[str, float]
    reason: str


class FakeTokenizer:
    """Knows no tokens that mean something."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""

    def get_vocab(self) -> dict[str, int]:
        return {}


class FakeVoice:
    tokenizer = FakeTokenizer()


@dataclass(frozen=True)
class FakeRequest:
    prompt: str
    mix: dict[str, float]
    sampling: Sampling
    router: str | None = None
    decision: FakeDecision | None = None
    state: int | None = None
    ids: tuple[int, ...] = ()
    voice: FakeVoice = field(default_factory=FakeVoice)

    @property
    def by_token(self) -> bool:
        return self.router == "arrow"


@dataclass(frozen=True)
class FakeAnswer:
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    decision: FakeDecision | None = None
    state: int | None = None


def answer_of(model: str, prompt: str, tokens: int) -> str:
    """What the fake says, whatever is asked beside it; the words themselves where a prompt asks for them."""
    if prompt.startswith("say "):
        return prompt.removeprefix("say ")
    return f"{model} says:" + "".join(f" {prompt}{number}" for number in range(tokens - 1))


@dataclass
class FakeEngine:
    """See above.

    Attributes:
        alone: adapters of a group of their own.
        seconds: for each token of a batch.
        reading: seconds for the prompts of a batch.
        wait: lets so many seconds pass.
        breaks: a prompt with this word breaks its whole batch.
        batches: the prompts of each batch, as they came.
        told: content and what stands beside it, of each request.
    """

    names: list[str] = field(default_factory=lambda: ["a", "b"])
    alone: tuple[str, ...] = ()
    seconds: float = 0.0
    reading: float = 0.0
    wait: Callable[[float], None] = time.sleep
    breaks: str = "crash"
    base_name: str = "some/base"
    context: int | None = 1000
    router: str | None = "embedding"
    batches: list[list[str]] = field(default_factory=list)
    at_step: Callable[[int], None] = lambda step: None
    told: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def use(self, text: str) -> FakeUse:
        return FakeUse(text, None if text == AUTO else parse_mix(text, self.names))

    def request(self, use: FakeUse, content: Any, sampling: Sampling, *, raw: bool = False, **more: Any) -> FakeRequest:
        self.told.append((content, more))
        prompt = content if isinstance(content, str) else "|".join(turn["content"] for turn in content)
        if "too long" in prompt:
            raise UsageError("the prompt has 2,000 tokens, and the model's context 1,000", "shorten it")
        if use.mix is None:
            name = "b" if "for b" in prompt else "a"
            decision = FakeDecision({name: 0.75}, f"{name} is nearest")
            return FakeRequest(prompt, parse_mix(name, self.names), sampling, self.router, decision)
        return FakeRequest(prompt, use.mix, sampling)

    def group(self, request: FakeRequest) -> Hashable:
        return next((name for name in request.mix if name in self.alone), "together")

    def generate(
        self,
        requests: Sequence[FakeRequest],
        on_piece: Callable[[int, str], None],
        on_done: Callable[[int, FakeAnswer], None],
        cancelled: Callable[[int], bool],
        paused: Callable[[], bool],
    ) -> list[FakeAnswer]:
        self.batches.append([request.prompt for request in requests])
        assert len({self.group(request) for request in requests}) == 1
        written = [request.state or 0 for request in requests]
        answers: dict[int, FakeAnswer] = {}
        step = 0
        self.wait(self.reading)
        while len(answers) < len(requests):
            if any(self.breaks in request.prompt for request in requests):
                raise RuntimeError("the secret of /home/somebody")
            self.wait(self.seconds)
            step += 1
            self.at_step(step)
            for row, request in enumerate(requests):
                if row in answers:
                    continue
                whole = answer_of(mix_text(request.mix), request.prompt, request.sampling.max_new_tokens)
                before = self._text(whole, written[row])
                written[row] += 1
                on_piece(row, self._text(whole, written[row])[len(before) :])
                done = written[row] == request.sampling.max_new_tokens
                stops = request.prompt.startswith("say ") and written[row] >= whole.count(" ")
                if done or stops or cancelled(row):
                    reason = "stop" if stops else "length" if done else "cancelled"
                    answers[row] = self._answer(request, whole, written[row], reason)
                    on_done(row, answers[row])
            if len(answers) < len(requests) and paused():
                for row, request in enumerate(requests):
                    if row not in answers:
                        answers[row] = self._answer(request, "", written[row], "paused", written[row])
        return [answers[row] for row in range(len(requests))]

    @staticmethod
    def _text(whole: str, tokens: int) -> str:
        words = whole.split(" ")
        return " ".join(words[: tokens + 1]) if tokens else ""

    def _answer(
        self, request: FakeRequest, whole: str, tokens: int, reason: str, state: int | None = None
    ) -> FakeAnswer:
        text = self._text(whole, tokens)
        return FakeAnswer(text, tuple(range(tokens)), len(request.prompt), reason, request.decision, state)

    def add(self, name: str, folder: Path) -> None:
        if name in self.names:
            raise UsageError(f"there is an adapter {name!r} already")
        self.names = [*self.names, name]

    def remove(self, name: str) -> None:
        if name not in self.names:
            raise UsageError(f"there is no adapter {name!r}")
        self.names = [other for other in self.names if other != name]
