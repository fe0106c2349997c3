"""`dynlora chat`: a conversation with base and adapters. `run` is the table of contents.

What a line means is said by generation/session.py, without a model; here it is done. What a person sees and types on is
a `Screen`; cli/views/chat.py has them.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dynlora_cli.config.mix import AUTO, BASE
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.whole import write_text
from dynlora_cli.generation.conversation import Turn, turns_to_skip
from dynlora_cli.generation.engine import Answer, Engine, Request, Use, Wanted
from dynlora_cli.generation.session import Ask, End, Save, Session, Tell, read, speaker_of
from dynlora_cli.generation.voice import Voice
from dynlora_cli.text import counted

LEAST_ROOM = 4  # of the context this share at least is kept for the answer, where it may be that long


@dataclass(frozen=True)
class Start:
    """How the chat begins.

    Attributes:
        use: who answers; None: the library's router, else the first adapter.
        compare: base and adapters answer side by side.
        system: a system message.
        settings: of `Sampling.of`, those that were given.
        kwargs: variables of the chat template, over those of training.
    """

    use: str | None = None
    compare: bool = False
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Screen(Protocol):
    """What a person, or a program, types and sees.

    Attributes:
        forgiving: what was typed wrong is said, and the chat goes on; else it ends there.
    """

    forgiving: bool

    def loading(self) -> AbstractContextManager[object]:
        """Entered while base and adapters are read."""

    def open(self, base: str, names: Sequence[str]) -> None:
        """The chat begins."""

    def read(self, session: Session) -> str | None:
        """The next line; None where there are no more. KeyboardInterrupt: another line is to be read."""

    def note(self, text: str) -> None:
        """What a person should know."""

    def tell(self, told: Tell) -> None:
        """What came of a command."""

    def problem(self, error: DynloraError) -> None:
        """What was typed cannot be done."""

    def begin(self, question: str, speakers: Sequence[str], requests: Sequence[Request]) -> None:
        """Answers begin, one for each speaker."""

    def piece(self, number: int, text: str) -> None:
        """A part of the answer of that number."""

    def done(self, number: int, answer: Answer) -> None:
        """That answer has ended."""

    def finish(self) -> None:
        """All answers have ended, or were stopped."""


def run(wanted: Wanted, start: Start, screen: Screen) -> None:
    """Talk until the person leaves.

    Args:
        wanted: base, adapters, library.
        start: who answers first, and how.
        screen: where lines come from, and answers go.

    Raises:
        UsageError: what is named is not there; and where the screen does not forgive, what was typed wrong.
        DynloraError: with the exit code that fits.
    """
    with ExitStack() as held:
        with screen.loading():
            engine = held.enter_context(Engine.open(wanted))
            session = _begin(engine, wanted, start)
        screen.open(engine.base_name, engine.names)
        converse(engine, session, screen, start.kwargs)


def converse(engine: Engine, session: Session, screen: Screen, kwargs: Mapping[str, Any] | None = None) -> Session:
    """Read lines and do what follows from them, until there are no more; the session at the end."""
    talk = _Talk(engine, screen, kwargs)
    while True:
        try:
            talk.tell_notes()
            if (line := screen.read(session)) is None:
                return session
            after, effect = read(session, line, engine)
            if isinstance(effect, End):
                return after
            session = session if effect is None else talk.do(after, effect) or session
        except KeyboardInterrupt:
            if not screen.forgiving:
                raise
        except DynloraError as error:
            if not screen.forgiving:
                raise
            screen.problem(error)


def _begin(engine: Engine, wanted: Wanted, start: Start) -> Session:
    """The session with who answers first."""
    use = start.use or (AUTO if wanted.library is not None else next(iter(engine.names), BASE))
    session = Session(speaker_of(use, engine), settings=start.settings)
    session = replace(session, conversation=replace(session.conversation, system=start.system))
    assert session.sampling  # what was given goes together
    return read(session, "/compare", engine)[0] if start.compare else session


class _Talk:
    """Does what follows from lines.

    Args:
        engine: answers.
        screen: shows it.
        kwargs: variables of the chat template, over those of training.
    """

    def __init__(self, engine: Engine, screen: Screen, kwargs: Mapping[str, Any] | None = None) -> None:
        self.engine, self.screen = engine, screen
        self._kwargs: dict[str, Any] = {"kwargs": kwargs} if kwargs else {}
        self._notes = 0
        self._said: set[str] = set()
        self._left_out = 0

    def tell_notes(self) -> None:
        """What the engine has noted since the last time."""
        for note in self.engine.notes[self._notes :]:
            self.screen.note(note)
        self._notes = len(self.engine.notes)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.screen.note(text)

    def do(self, session: Session, effect: Ask | Tell | Save) -> Session | None:
        """What a line has asked for; the session after it, None where nothing came of a question.

        Raises:
            UsageError: it cannot be done.
        """
        if isinstance(effect, Ask):
            return self._answer(session, effect.question)
        if isinstance(effect, Save):
            self._save(session, effect)
        elif isinstance(effect, Tell):
            self.screen.tell(effect)
        return session

    # -- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, session: Session, question: str) -> Session | None:
        """Answers of all speakers to a question, written side by side; the session with them, if there are any.

        Raises:
            KeyboardInterrupt: somebody asked to stop, and the screen does not forgive.
        """
        with stoppable() as stopped:
            said = self._written(session, question, stopped)
        if stopped() and not self.screen.forgiving:
            raise KeyboardInterrupt
        answers = {who: text if request.continues else text.strip() for who, request, text in said if text.strip()}
        if session.speaker not in answers:
            self.screen.note("there is no answer; the conversation is as it was before the question")
            return None
        turn = Turn(question, answers, session.speaker)
        return replace(session, conversation=session.conversation.with_turn(turn))

    def _written(self, session: Session, question: str, stopped: Callable[[], bool]) -> list[tuple[str, Request, str]]:
        """What each speaker has said, as far as it came."""
        try:
            requests = [self._request(session, speaker, question) for speaker in session.speakers]
        except KeyboardInterrupt:  # pressed twice, as where a router takes long
            return []
        self.tell_notes()
        texts = [""] * len(requests)

        def piece(number: int, text: str) -> None:
            if not texts[number] and not requests[number].continues:
                text = text.lstrip()  # white space that opens a turn is the template's, and no part of what is said
            texts[number] += text
            if text:
                self.screen.piece(number, text)

        self.screen.begin(question, session.speakers, requests)
        try:
            self.engine.generate(requests, piece, lambda _: stopped(), on_done=self.screen.done)
        except KeyboardInterrupt:  # pressed twice: the model did not come to its next token
            pass
        finally:
            self.screen.finish()
        return list(zip(session.speakers, requests, texts, strict=True))

    def _request(self, session: Session, speaker: str, question: str) -> Request:
        """A speaker's prompt: the conversation as far as it fits, or the bare question."""
        engine, talk, sampling = self.engine, session.conversation, session.sampling
        use = engine.use(speaker)
        voices = _voices(engine, use)
        if not all(voice.chat for voice in voices):
            who = speaker if use.mix is not None else "one of those whom a router may choose"
            without = " and without the system message" if talk.system else ""
            self.say_once(
                f"{who} is asked in bare text: each line is a prompt of its own, without the lines before it{without}"
            )
            return engine.request(use, question, sampling)
        skip = 0
        if talk.turns and engine.context is not None:
            room = min(sampling.max_new_tokens, engine.context // LEAST_ROOM)

            def tokens(skip: int) -> int:
                return max(
                    len(voice.chat_ids(talk.messages(speaker, question, skip), None, **self._kwargs)[0])
                    for voice in voices
                )

            skip = turns_to_skip(tokens, talk.turns, engine.context - room)
        if skip > self._left_out:
            self.screen.note(
                f"the conversation is longer than the model's context of {engine.context:,} tokens: the first "
                f"{counted(skip, 'turn')} {'is' if skip == 1 else 'are'} left out"
            )
        self._left_out = skip
        return engine.request(use, talk.messages(speaker, question, skip), sampling, **self._kwargs)

    # -- files -------------------------------------------------------------------------------------------------------

    def _save(self, session: Session, save: Save) -> None:
        """The conversation to a file that `dynlora train` and `eval` read.

        Raises:
            UsageError: the file is there already, or cannot be written.
        """
        voices = _voices(self.engine, self.engine.use(session.speaker))
        rows = session.conversation.rows(chat=all(voice.chat for voice in voices))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = save.path
        try:
            if path.exists() and save.how == "new":
                ways = f"/save {path} append, or /save {path} overwrite, or another name"
                raise UsageError(f"/save: {path} is there already", ways)
            before = path.read_text(encoding="utf-8") if save.how == "append" and path.exists() else ""
            whole = before if not before or before.endswith("\n") else before + "\n"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, whole + text)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name for a file
            raise UsageError(f"/save: {path} cannot be written ({getattr(error, 'strerror', None) or error})") from None
        did = "added to" if before else "written to"
        self.screen.tell(Tell(f"{counted(len(session.conversation.turns), 'turn')} {did} {path}"))


def _voices(engine: Engine, use: Use) -> list[Voice]:
    """How those are asked who may answer: of `auto` the base and each adapter."""
    mixes = [use.mix] if use.mix is not None else [{}, *({name: 1.0} for name in engine.names)]
    return [engine.voice(mix) for mix in mixes]


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """In this block Ctrl-C asks for a stop, and a second time raises KeyboardInterrupt.

    Ctrl-C alone: SIGTERM and a closed terminal end the chat, where `interruptible` would only end the answer.
    """
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
