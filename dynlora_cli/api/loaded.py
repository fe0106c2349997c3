"""A base with one adapter in memory, as `api.load` returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from dynlora_cli import plugins
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.arguments import scalar, several
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.generation.engine import Engine, Wanted
from dynlora_cli.models.alone import making_a_model, one_at_a_time
from dynlora_cli.models.quiet import quiet
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter

AT_ONCE = 8  # answers that are written together
PROMPT = "a text, the messages of a conversation, or a list of these"


Conversation = Sequence[Mapping[str, Any]]  # messages, each with role and content


@dataclass(repr=False)
class Loaded:
    """A base with an adapter in memory. A context manager; `close` it where it is not used as one.

    Attributes:
        name: of the adapter.
        base_name: folder or hub id of the base.
        model: the transformers model with the adapter on it, for code of your own; in eval mode, nothing of it trains.
        tokenizer: the adapter's own, where its folder has one; else the base's.
    """

    name: str
    base_name: str
    _memory: _Memory | None
    _lock: Any = field(default_factory=RLock)

    @classmethod
    def open(cls, folder: Path, base: str | None, trust_remote_code: bool) -> Loaded:
        """Read the adapter and load its base."""
        with one_at_a_time:
            adapter = read_adapter(folder, base, routed=True)
            if does := plugins.declared("tasks", adapter.task, "SILENT"):
                return cls._silent(adapter, f"{adapter.task}: {does}", base, trust_remote_code)
            engine = Engine.open(Wanted([folder], base=base, trust_remote_code=trust_remote_code))
            name = engine.names[0]
            memory = _Memory(engine.bank.model, engine.tokenizer, engine)
            memory.put_on(name)
        return cls(name, engine.base_name, memory)

    @classmethod
    def _silent(cls, adapter: Adapter, does: str, base: str | None, trust_remote_code: bool) -> Loaded:
        """A model that writes no text, such as a classifier."""
        place = find_base(adapter, base, trust_remote_code)
        tokenizer = read_tokenizer(adapter, place)
        with quiet:
            model = base_in_memory(adapter, place, tokenizer).model
        memory = _Memory(model, tokenizer, silent=does)
        memory.on.enter_context(attached(model, adapter))
        model.requires_grad_(False)
        model.eval()
        return cls(adapter.name, str(place.options.name_or_path), memory)

    @property
    def engine(self) -> Engine:
        """What answers, the same as of `dynlora generate` and `dynlora serve`.

        Raises:
            UsageError: the model writes no text, or it is closed.
        """
        memory = self._open
        if memory.engine is None:
            raise UsageError(
                f"{self.name} is for {memory.silent}, and writes no text",
                "ask it by .model and .tokenizer: model(**tokenizer(text, return_tensors='pt').to(model.device))",
            )
        return memory.engine

    @property
    def model(self) -> PreTrainedModel:
        """With the adapter on it; see above."""
        return self._open.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See above."""
        return self._open.tokenizer

    @property
    def _open(self) -> _Memory:
        if self._memory is None:
            raise UsageError(f"{self.name} is closed", "load it again, or ask inside the with block")
        return self._memory

    @property
    def notes(self) -> list[str]:
        """What a person should know, such as what was guessed about the form of a prompt."""
        engine = self._open.engine
        return list(engine.notes) if engine else []

    @overload
    def generate(self, prompt: str | Conversation, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str] | Sequence[Conversation], **options: Any) -> list[str]: ...

    def generate(
        self,
        prompt: str | Conversation | Sequence[str] | Sequence[Conversation],
        *,
        use: str | None = None,
        system: str | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """What the adapter answers, in the form that it was trained in: as a chat, or as bare text.

        Args:
            prompt: a text, or the messages of a conversation; or several, which are answered side by side.
            use: who answers: the adapter by default; "base", or a mix such as "0.5*NAME".
            system: a system message before each prompt.
            sampling: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`,
                `seed`, `stop_strings`: by the names and in the meaning of transformers. Nothing: greedy, 256 tokens.

        Raises:
            UsageError: a prompt or an option that cannot be, a model that writes no text, or one that is closed.
            MeasureError: the logits of the model became NaN.
        """
        prompts, one = _prompts(prompt)
        asked = _sampling(sampling)
        for option, value in (("use", use), ("system", system)):
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{option}: got a {type(value).__name__}, must be a text")
        with self._lock, making_a_model():
            engine, memory = self.engine, self._open
            memory.on.close()
            try:
                who = engine.use(self.name if use is None else use)
                requests = [engine.request(who, text, asked, system=system) for text in prompts]
                batches = [requests[at : at + AT_ONCE] for at in range(0, len(requests), AT_ONCE)]
                answers = [answer for batch in batches for answer in engine.generate(batch)]
            finally:
                memory.put_on(self.name)
        if any(answer.finish_reason == "failed" for answer in answers):
            raise MeasureError("the logits of the model became NaN", "look at its weights and its dtype")
        return answers[0].text if one else [answer.text for answer in answers]

    def close(self) -> None:
        """Take the adapter off, and let the model go."""
        with self._lock:
            memory, self._memory = self._memory, None
            if memory is not None:
                memory.close()

    def __enter__(self) -> Loaded:
        self._open  # noqa: B018 - refused where it is closed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} on {self.base_name}{'' if self._memory else ', closed'}>"


@dataclass
class _Memory:
    """What `close` lets go.

    Attributes:
        engine: what writes text.
        silent: in words, what a model does that writes none.
        on: holds the adapter on the model, for code of others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine | None = None
    silent: str = ""
    on: ExitStack = field(default_factory=ExitStack)

    def put_on(self, name: str) -> None:
        """Let the adapter speak."""
        assert self.engine is not None
        if name in self.engine.names:
            self.on.enter_context(self.engine.bank.active([{name: 1.0}]))

    def close(self) -> None:
        """Leave the plain base to whoever holds it still."""
        self.on.close()
        if self.engine is not None:
            self.engine.close()


def _prompts(given: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether it is a single one, not in a list.

    Raises:
        UsageError: it is neither text nor messages.
    """
    if isinstance(given, str):
        return [given], True
    prompts = several("prompt", given, PROMPT)
    if prompts and all(isinstance(one, Mapping) for one in prompts):
        return [prompts], True
    for one in prompts:
        messages = isinstance(one, Sequence) and not isinstance(one, (str, bytes)) and len(one) > 0
        if not (isinstance(one, str) or (messages and all(isinstance(message, Mapping) for message in one))):
            raise UsageError(f"prompt: got a {type(one).__name__} in a list, must be {PROMPT}")
    return prompts, False


def _sampling(given: dict[str, Any]) -> Sampling:
    known = Sampling.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(
                f"generate has no option {name!r}{did_you_mean(name, known)}", f"it has: {', '.join(known)}"
            )
    given = {name: scalar(value) for name, value in given.items()}
    stops, drawn = given.get("stop_strings"), given.get("do_sample")
    given["stop_strings"] = [stops] if isinstance(stops, str) else several("stop_strings", stops or (), "texts")
    if drawn is not None and not isinstance(drawn, bool):
        raise UsageError(f"do_sample is {drawn!r}, must be True or False")
    return Sampling.of(**given)
