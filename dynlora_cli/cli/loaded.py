"""A base with one adapter in memory, as `api.load` returns it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.generation.engine import Engine, Wanted
from dynlora_cli.models.alone import making_a_model, one_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 8  # answers that are written together


@dataclass(frozen=True, repr=False)
class Loaded:
    """A base with an adapter in memory. A context manager; `close` it where it is not used as one.

    Attributes:
        engine: what answers, the same as of `dynlora generate` and `dynlora serve`.
        name: of the adapter.
    """

    engine: Engine
    name: str
    _on: ExitStack = field(default_factory=ExitStack)  # holds the adapter on the model, for code of others
    _lock: Any = field(default_factory=RLock)

    @classmethod
    def open(cls, folder: Path, base: str | None, trust_remote_code: bool) -> Loaded:
        """Read the adapter and load its base."""
        with one_at_a_time:
            engine = Engine.open(Wanted([folder], base=base, trust_remote_code=trust_remote_code))
            loaded = cls(engine, engine.names[0])
            loaded._put_on()
        return loaded

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model with the adapter on it, for code of your own; in eval mode, nothing of it trains."""
        return self.engine.bank.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own, where its folder has one; else the base's."""
        return self.engine.tokenizer

    @property
    def notes(self) -> list[str]:
        """What a person should know, such as what was guessed about the form of a prompt."""
        return list(self.engine.notes)

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        use: str | None = None,
        system: str | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """What the adapter answers, in the form that it was trained in: as a chat, or as bare text.

        Args:
            prompt: one, or several, which are answered side by side.
            use: who answers: the adapter by default; "base", or a mix such as "0.5*NAME".
            system: a system message before each prompt.
            sampling: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`,
                `seed`, `stop_strings`: by the names and in the meaning of transformers. Nothing: greedy, 256 tokens.

        Raises:
            UsageError: a prompt or an option that cannot be.
            MeasureError: the logits of the model became NaN.
        """
        asked = _sampling(sampling)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with self._lock, making_a_model():
            self._on.close()
            try:
                who = self.engine.use(use or self.name)
                requests = [self.engine.request(who, text, asked, system=system) for text in prompts]
                batches = [requests[at : at + AT_ONCE] for at in range(0, len(requests), AT_ONCE)]
                answers = [answer for batch in batches for answer in self.engine.generate(batch)]
            finally:
                self._put_on()
        if any(answer.finish_reason == "failed" for answer in answers):
            raise MeasureError("the logits of the model became NaN", "look at its weights and its dtype")
        return answers[0].text if isinstance(prompt, str) else [answer.text for answer in answers]

    def close(self) -> None:
        """Take the adapter off, and let the model go."""
        with self._lock:
            self._on.close()
            self.engine.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} on {self.engine.base_name}>"

    def _put_on(self) -> None:
        if self.name in self.engine.names:
            self._on.enter_context(self.engine.bank.active([{self.name: 1.0}]))


def _sampling(given: dict[str, Any]) -> Sampling:
    known = Sampling.__dataclass_fields__
    for name in given:
        if name not in known:
            from dynlora_cli.text import did_you_mean

            raise UsageError(
                f"generate has no option {name!r}{did_you_mean(name, known)}", f"it has: {', '.join(known)}"
            )
    if isinstance(given.get("stop_strings"), str):
        given = given | {"stop_strings": (given["stop_strings"],)}
    return Sampling.of(**given)
