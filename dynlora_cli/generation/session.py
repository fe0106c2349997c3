"""What is typed in a chat: a line and a session give the next session and an effect. No model and no terminal here.

read(session, "/adapter poet", who)     the session with another speaker, and what to say about it
read(session, "Good morning", who)      the same session, and a question to be answered
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from dynlora_cli.config.mix import AUTO, BASE, mix_text
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.conversation import Conversation
from dynlora_cli.text import counted, did_you_mean

COMMANDS = {
    "/adapter": ("NAME", "this adapter answers; without a name: which there are"),
    "/base": ("", "the model alone answers"),
    "/weights": ("a=0.7,b=0.3", "a mix answers; 0.7*a+0.3*b says the same"),
    "/auto": ("", "a router decides who answers"),
    "/compare": ("[A, B ...]", "base and adapters answer side by side, or those named; off: one again"),
    "/system": ("TEXT", "the system message; - for none"),
    "/set": ("temperature=0.7 ...", "how answers are drawn; default takes a value back; alone: what is set"),
    "/retry": ("", "the last question once more"),
    "/undo": ("", "take back the last question and its answer"),
    "/clear": ("", "begin anew; speaker, system message and settings stay"),
    "/save": ("FILE.jsonl", "the conversation as a row to train on; behind the name: append, or overwrite"),
    "/help": ("", "these lines"),
    "/quit": ("", "leave, as Ctrl-D does"),
}
SAME = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/?": "/help", "/mix": "/weights", "/reset": "/clear"}
_WORD = re.compile(r"/[\w?-]*")
_NONE = ("default", "none", "null")


class Who(Protocol):
    """What an engine says of speakers."""

    @property
    def names(self) -> Sequence[str]:
        """Of the adapters."""

    def use(self, text: str) -> Any:
        """What a mix, `base` or `auto` means, with the attribute `mix`; UsageError where it means nothing."""


@dataclass(frozen=True)
class Session:
    """All that a chat knows.

    Attributes:
        speaker: who answers, as `--use` names it; its answers count.
        beside: all who answer where several do, the speaker among them; empty: the speaker alone.
        settings: of `Sampling`, those that were given.
        conversation: so far.
        attempt: how often the last question was asked again.
    """

    speaker: str
    beside: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    conversation: Conversation = field(default_factory=Conversation)
    attempt: int = 0

    @property
    def speakers(self) -> tuple[str, ...]:
        return self.beside or (self.speaker,)

    @property
    def sampling(self) -> Sampling:
        """How the next answer is written; one more try with the same seed draws other numbers."""
        sampling = Sampling.of(**self.settings)
        return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + self.attempt)


@dataclass(frozen=True)
class Ask:
    """A question to be answered."""

    question: str


@dataclass(frozen=True)
class Tell:
    """Something to say to the person; `rows` are pairs of columns."""

    text: str = ""
    rows: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Save:
    """The conversation is to be written to a file."""

    path: Path
    how: Literal["new", "append", "overwrite"]


@dataclass(frozen=True)
class End:
    """The chat is over."""


Effect = Ask | Tell | Save | End


def read(session: Session, line: str, who: Who) -> tuple[Session, Effect | None]:
    """What a line that was typed means. `//text` is the text `/text`; None: nothing is to be done.

    Raises:
        UsageError: a command that there is not, or that cannot be done; the session stays as it was.
    """
    text = line.strip()
    if not text:
        return session, None
    if not text.startswith("/") or text.startswith("//"):
        # As it was typed: a prompt in bare text may end in a space.
        return replace(session, attempt=0), Ask(line.lstrip()[1:] if text.startswith("//") else line)
    match = _WORD.match(text)
    word = match[0] if match else "/"
    name, argument = SAME.get(word.lower(), word.lower()), text[len(word) :].strip()
    if name not in COMMANDS or (argument and not text[len(word)].isspace()):
        near = did_you_mean(name, COMMANDS)
        raise UsageError(f"there is no command {text.split()[0]}{near}", "/help lists them; // begins a text with /")
    if argument and not COMMANDS[name][0]:
        raise UsageError(f"{name} takes nothing behind it, and there is {argument!r}")
    return _DO[name](session, argument, who)


def speaker_of(text: str, who: Who) -> str:
    """One way of writing who answers, whatever a person wrote.

    Raises:
        UsageError: it names nobody.
    """
    mix = who.use(text).mix
    return AUTO if mix is None else mix_text(mix, who.names)


# -- who answers -----------------------------------------------------------------------------------------------------


def _adapter(session: Session, argument: str, who: Who) -> tuple[Session, Effect]:
    if not argument:
        return session, Tell(_there_are(who))
    if argument not in who.names:
        raise UsageError(f"there is no adapter {argument!r}{did_you_mean(argument, who.names)}", _there_are(who))
    return _speaking(session, argument, who)


def _base(session: Session, _: str, who: Who) -> tuple[Session, Effect]:
    return _speaking(session, BASE, who)


def _auto(session: Session, _: str, who: Who) -> tuple[Session, Effect]:
    return _speaking(session, AUTO, who)


def _weights(session: Session, argument: str, who: Who) -> tuple[Session, Effect]:
    if not argument:
        return session, Tell(f"{session.speaker} answers; such as /weights {_example(who)}")
    return _speaking(session, mix_of_weights(argument), who)


def mix_of_weights(text: str) -> str:
    """`a=0.7,b=0.3` as the mix `0.7*a+0.3*b`; a mix as it is.

    Raises:
        UsageError: a part has no weight.
    """
    if "=" not in text:
        return text
    terms = []
    for part in text.split(","):
        name, equals, weight = (word.strip() for word in part.rpartition("="))
        if not equals or not name or not weight:
            raise UsageError(f"/weights {text}: {part.strip()!r} is not NAME=WEIGHT", "such as /weights a=0.7,b=0.3")
        sign, size = "-" if weight.startswith("-") else "+", weight.lstrip("+-")
        terms.append(f"{sign}{name}" if size == "1" else f"{sign}{size}*{name}")
    return "".join(terms).removeprefix("+")


def _speaking(session: Session, text: str, who: Who) -> tuple[Session, Effect]:
    speaker = speaker_of(text, who)
    return replace(session, speaker=speaker, beside=()), Tell(f"{speaker} answers")


def _compare(session: Session, argument: str, who: Who) -> tuple[Session, Effect]:
    if argument in ("off", "stop"):
        return replace(session, beside=()), Tell(f"{session.speaker} answers")
    named = [speaker_of(part, who) for part in argument.split(",")] if argument else [BASE, *who.names, session.speaker]
    beside = tuple(dict.fromkeys(named))
    if len(beside) < 2:
        alone = "there is no adapter to compare the base with" if not argument else f"{beside[0]} is all that is named"
        raise UsageError(f"/compare: {alone}", f"such as /compare {BASE}, {_example(who)}" if who.names else None)
    speaker = session.speaker if session.speaker in beside else beside[-1]
    return replace(session, speaker=speaker, beside=beside), Tell(
        f"{', '.join(beside)} answer side by side; each goes on from its own answers, and those of {speaker} are saved"
    )


def _there_are(who: Who) -> str:
    return f"there are: {', '.join(who.names)}" if who.names else "no adapter is loaded"


def _example(who: Who) -> str:
    names = [*who.names, "a", "b"] if len(who.names) < 2 else list(who.names)
    return f"0.7*{names[0]}+0.3*{names[1]}"


# -- how answers are written -----------------------------------------------------------------------------------------


def _system(session: Session, argument: str, _: Who) -> tuple[Session, Effect]:
    conversation = session.conversation
    if not argument:
        return session, Tell(f"the system message: {conversation.system}" if conversation.system else "there is none")
    system = None if argument == "-" else argument
    said = "from now on a system message is sent" if system else "no system message"
    return replace(session, conversation=replace(conversation, system=system)), Tell(said)


def _set(session: Session, argument: str, _: Who) -> tuple[Session, Effect]:
    settings = dict(session.settings)
    for part in re.split(r"[,\s]+", argument) if argument else ():
        key, equals, value = part.partition("=")
        _refuse_unknown(key)
        if not equals or not value:
            raise UsageError(f"/set {part}: a value is missing", f"such as /set {key or 'temperature'}=0.7")
        if value in _NONE:
            settings.pop(key, None)
        else:
            settings[key] = _value(key, value)
    sampling = Sampling.of(**settings)
    return replace(session, settings=settings), Tell(_in_words(sampling))


def _refuse_unknown(key: str) -> None:
    known = [one.name for one in fields(Sampling)]
    if key not in known:
        raise UsageError(
            f"/set {key}: there is no such setting{did_you_mean(key, known)}", f"there are: {', '.join(known)}"
        )


def _value(key: str, text: str) -> Any:
    """A setting as the type that its key has.

    Raises:
        UsageError: the text is no such value.
    """
    if key == "stop_strings":
        return (text.replace("\\n", "\n"),)
    if key == "do_sample":
        if text.lower() not in ("true", "false"):
            raise UsageError(f"/set {key}={text}: true or false")
        return text.lower() == "true"
    whole = key in ("max_new_tokens", "top_k", "seed")
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"/set {key}={text}: it takes a {'whole number' if whole else 'number'}") from None


def _in_words(sampling: Sampling) -> str:
    """The settings that matter, in one line."""
    if not sampling.do_sample:
        drawn = "the likeliest token each time"
    else:
        shaped = [("temperature", sampling.temperature), ("top_p", sampling.top_p), ("top_k", sampling.top_k)]
        shaped += [("min_p", sampling.min_p), ("seed", sampling.seed)]
        given = ", ".join(
            f"{key} {value:g}" for key, value in shaped if value is not None and (key, value) != ("top_p", 1)
        )
        drawn = f"tokens are drawn: {given}"
    penalty = "" if sampling.repetition_penalty == 1 else f", repetition_penalty {sampling.repetition_penalty:g}"
    stops = f", up to {', '.join(map(repr, sampling.stop_strings))}" if sampling.stop_strings else ""
    return f"{drawn}{penalty}{stops}, at most {counted(sampling.max_new_tokens, 'token')}"


# -- the conversation ------------------------------------------------------------------------------------------------


def _retry(session: Session, _: str, __: Who) -> tuple[Session, Effect]:
    last = _last(session, "to ask again")
    again = replace(session, conversation=session.conversation.without_last(), attempt=session.attempt + 1)
    return again, Ask(last.question)


def _undo(session: Session, _: str, __: Who) -> tuple[Session, Effect]:
    last = _last(session, "to take back")
    shown = last.question if len(last.question) <= 60 else f"{last.question[:59]}…"
    left = len(session.conversation.turns) - 1
    text = f"taken back: {shown} ({counted(left, 'turn') if left else 'nothing'} before it)"
    return replace(session, conversation=session.conversation.without_last(), attempt=0), Tell(text)


def _last(session: Session, purpose: str) -> Any:
    if not session.conversation.turns:
        raise UsageError(f"nothing was said yet {purpose}")
    return session.conversation.turns[-1]


def _clear(session: Session, _: str, __: Who) -> tuple[Session, Effect]:
    fresh = replace(session, conversation=Conversation(system=session.conversation.system), attempt=0)
    kept = "; the system message stays" if session.conversation.system else ""
    return fresh, Tell(f"a new conversation{kept}")


def _save(session: Session, argument: str, _: Who) -> tuple[Session, Effect]:
    path, _space, how = argument.rpartition(" ")
    if how not in ("append", "overwrite"):
        path, how = argument, "new"
    path = path.strip()
    if not path:
        raise UsageError("/save: a file is missing", "such as /save talk.jsonl")
    if not path.lower().endswith(".jsonl"):
        raise UsageError(f"/save {path}: it must end in .jsonl, by which train and eval know it", f"/save {path}.jsonl")
    if not session.conversation.turns:
        raise UsageError("/save: nothing was said yet")
    try:
        return session, Save(Path(path).expanduser(), how)  # type: ignore[arg-type]
    except RuntimeError:
        raise UsageError(f"/save {path}: this machine has no such user", "write the path out") from None


def _help(session: Session, _: str, __: Who) -> tuple[Session, Effect]:
    rows = tuple((f"{name} {wants}".strip(), what) for name, (wants, what) in COMMANDS.items())
    more = (('"""', "begins and ends a text of several lines"), ("Ctrl-C", "stops an answer"))
    return session, Tell(rows=(*rows, *more))


def _quit(session: Session, _: str, __: Who) -> tuple[Session, Effect]:
    return session, End()


_DO: dict[str, Callable[[Session, str, Who], tuple[Session, Effect]]] = {
    "/adapter": _adapter,
    "/base": _base,
    "/weights": _weights,
    "/auto": _auto,
    "/compare": _compare,
    "/system": _system,
    "/set": _set,
    "/retry": _retry,
    "/undo": _undo,
    "/clear": _clear,
    "/save": _save,
    "/help": _help,
    "/quit": _quit,
}
