"""`dynlora generate`: what base and adapters answer to prompts. `run` is the table of contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dynlora_cli.config.mix import AUTO, BASE
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import DataError, MeasureError, UsageError
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.generation.engine import Answer, Engine, Request, Use, Wanted
from dynlora_cli.generation.prompts import Prompt

AT_ONCE = 8  # answers that are written together
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Spoken:
    """One answer to be given: which prompt, and who gives it."""

    prompt: int
    use: Use


class Listener(Protocol):
    """Shows answers. Those of a call come in the order in which they were asked for."""

    def note(self, text: str) -> None:
        """What a person should know."""

    def begin(self, spoken: Spoken, request: Request) -> None:
        """An answer begins."""

    def piece(self, text: str) -> None:
        """A part of it."""

    def end(self, spoken: Spoken, request: Request, answer: Answer) -> None:
        """It has ended."""


@dataclass(frozen=True)
class Asked:
    """What a person asks.

    Attributes:
        prompts: in order.
        uses: who answers each of them, as in `--use`; none: all adapters, and with a library its router.
        compare: the base and all adapters answer.
        system: a system message before each prompt.
        sampling: how answers are written.
        kwargs: variables of the chat template, over those of training and of rows.
    """

    prompts: Sequence[Prompt]
    uses: Sequence[str]
    compare: bool
    system: str | None
    sampling: Sampling
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def run(wanted: Wanted, asked: Asked, listener: Listener) -> None:
    """Answer prompts.

    Args:
        wanted: base, adapters, library.
        asked: prompts, and who answers them.
        listener: shows answers as they come.

    Raises:
        MeasureError: some answers failed: a model's logits became NaN.
        DynloraError: with the exit code that fits.
        KeyboardInterrupt: somebody asked to stop; what was written until then has been shown.
    """
    with Engine.open(wanted) as engine:
        uses = _uses(engine, wanted, asked)
        spoken = [Spoken(number, use) for number in range(len(asked.prompts)) for use in uses]
        notes, whole = _Notes(engine, listener), True
        # All at once, so that what cannot be asked is known before anything is written; a router would take long.
        early = [] if any(use.auto for use in uses) else [_request(engine, asked, each) for each in spoken]
        with interruptible() as stopped:
            for at in range(0, len(spoken), AT_ONCE):
                batch = spoken[at : at + AT_ONCE]
                requests = early[at : at + AT_ONCE] or [_request(engine, asked, each) for each in batch]
                notes.tell()
                whole &= _answer(engine, batch, requests, listener, stopped)
                notes.tell()
                if stopped():
                    raise KeyboardInterrupt
    if not whole:
        raise MeasureError("the logits of a model became NaN", "look at its weights and its dtype")


def _uses(engine: Engine, wanted: Wanted, asked: Asked) -> list[Use]:
    """Who answers each prompt, each once."""
    texts = list(asked.uses)
    if asked.compare:
        texts = [BASE, *engine.names, *texts]
    elif not texts and wanted.library is not None:
        texts = [AUTO]
    elif not texts:
        texts = engine.names or [BASE]
    uses: dict[Any, Use] = {}
    for text in texts:
        use = engine.use(text)
        uses.setdefault(AUTO if use.mix is None else tuple(use.mix.items()), use)
    return list(uses.values())


def _request(engine: Engine, asked: Asked, spoken: Spoken) -> Request:
    prompt = asked.prompts[spoken.prompt]
    content: Any = prompt.content
    raw = prompt.raw
    if prompt.bare is not None and spoken.use.mix is not None and not engine.voice(spoken.use.mix).chat:
        content, raw = prompt.bare, True
    if raw and asked.system is not None:
        raise UsageError("--system is a turn of a conversation, and this prompt is bare text", "leave --system out")
    try:
        kwargs = {**prompt.kwargs, **asked.kwargs}
        return engine.request(
            spoken.use, content, asked.sampling, system=asked.system, tools=prompt.tools, kwargs=kwargs, raw=raw
        )
    except UsageError as error:
        if not prompt.place:
            raise
        raise DataError(f"{prompt.place}: {error.message}", error.hint) from None


def _answer(
    engine: Engine,
    batch: Sequence[Spoken],
    requests: Sequence[Request],
    listener: Listener,
    stopped: Stopped,
) -> bool:
    """Answers of one batch, each shown as it comes once those before it have ended."""
    shown = _InOrder(batch, requests, listener)
    answers = engine.generate(requests, shown.piece, lambda _: stopped(), on_done=shown.done)
    return all(answer.finish_reason != "failed" for answer in answers)


class _InOrder:
    """Shows answers that are written side by side one after the other."""

    def __init__(self, batch: Sequence[Spoken], requests: Sequence[Request], listener: Listener) -> None:
        self.batch, self.requests, self.listener = batch, requests, listener
        self.pieces: list[list[str]] = [[] for _ in batch]
        self.answers: dict[int, Answer] = {}
        self.at = 0
        self._begin()

    def piece(self, number: int, text: str) -> None:
        """A part of an answer."""
        if number == self.at:
            self.listener.piece(text)
        else:
            self.pieces[number].append(text)

    def done(self, number: int, answer: Answer) -> None:
        """An answer has ended."""
        self.answers[number] = answer
        while self.at in self.answers:
            self.listener.end(self.batch[self.at], self.requests[self.at], self.answers[self.at])
            self.at += 1
            self._begin()

    def _begin(self) -> None:
        if self.at < len(self.batch):
            self.listener.begin(self.batch[self.at], self.requests[self.at])
            if waiting := "".join(self.pieces[self.at]):
                self.listener.piece(waiting)


class _Notes:
    """Tells each note of an engine once."""

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self.engine, self.listener, self.told = engine, listener, 0

    def tell(self) -> None:
        """What is new."""
        notes = self.engine.notes
        for note in notes[self.told :]:
            self.listener.note(note)
        self.told = len(notes)
