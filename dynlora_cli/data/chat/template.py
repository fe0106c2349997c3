"""A conversation as the tokenizer's chat template writes it: on which day, and what the template leaves out.

Templates may write the date (`strftime_now`: Llama 3.2, Granite, gpt-oss). A run that goes on tomorrow must see the
rows it began with, so a run writes all of them on the day it began, which its record keeps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock, local
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dynlora_cli.config.types import RESERVED_KWARGS
from dynlora_cli.data.chat.limits import SECONDS, in_bounds
from dynlora_cli.data.forms import BadRowError, Turns
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.time_limit import limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "\ue000"  # private use: no data holds it, no template knows it
ADVICE = "use another dataset.chat_template, or dataset.train_on: all"
_DATE = "%Y-%m-%dT%H:%M:%S%z"
_LINKS = {"role", "id", "tool_call_id", "type", "index"}  # they tie messages together; nobody reads them as text
_CALLS = ("tool_calls", "function_call")
_NOTHING: Mapping[str, Any] = {}
_here, _changing = local(), Lock()
_clocks: list[Any] = []  # what `on_date` has found, once for every thread that is inside
_LOOKS = 8  # rows in which a field is looked for before it counts as left out: some show it in certain places only


@dataclass(frozen=True, slots=True)
class Writing:
    """How a run writes its rows. Fixed when it begins, so that resuming and measuring on another day read the same.

    Args:
        date: what the chat template takes for now, such as 2026-11-20T12:00:00+0000.
        turned: by format of pairs, whether its rows become turns; what is not there is decided by `dataset.chat`.
        labels: names of a classifier's classes in their order; none where the rows are to tell.
        template_kwargs: variables of the chat template, by `dataset.chat_template_kwargs`.
        system: the system message of conversations without one, by `dataset.system`.
        reasoning: what becomes of the assistant's reasoning, by `dataset.reasoning`.
    """

    date: str = field(default_factory=lambda: time.strftime(_DATE))
    turned: Mapping[str, bool] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    reasoning: str = "keep"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Writing:
        """As the run with this dynlora.json did it; as anybody would today where there is none."""
        data = record.get("data") or {}
        labels = tuple(map(str, data.get("labels") or ()))
        if "date" in data:
            turned, kwargs, system = data.get("turned"), data.get("template_kwargs"), data.get("system")
            kwargs = kwargs if isinstance(kwargs, Mapping) else {}
            return cls(
                str(data["date"]),
                dict(turned) if isinstance(turned, Mapping) else {},
                labels,
                {str(name): value for name, value in kwargs.items() if name not in RESERVED_KWARGS},
                system if isinstance(system, str) else None,
                str(data.get("reasoning") or "keep"),
            )
        if (record.get("recipe") or {}).get("dataset"):
            # Version 0.1 wrote no date but that of its start, kept pairs as text, and made turns of instructions.
            return cls(str(record.get("started", "")), {"completion": False, "alpaca": True}, labels)
        return cls()

    @property
    def is_bare(self) -> bool:
        """Whether all rows were bare text though the model has a chat template, as far as the record says."""
        return bool(self.turned) and not any(self.turned.values())

    @property
    def moment(self) -> datetime:
        """The date as the clock on the wall showed it."""
        try:
            return datetime.strptime(self.date, _DATE).replace(tzinfo=None)
        except ValueError:  # a record that somebody else made
            return datetime.now().replace(microsecond=0)


@contextmanager
def on_date(moment: datetime) -> Iterator[None]:
    """In this block `strftime_now` in chat templates gives this moment, to this thread alone."""
    from transformers.utils import chat_template_utils as library

    # The function that templates call is made inside transformers, and looks at the clock by this name.
    with _changing:
        clock = _clocks[0] if _clocks else library.datetime
        _clocks.append(clock)
        stands = SimpleNamespace(now=lambda: getattr(_here, "moment", None) or clock.now())
        library.datetime = stands  # type: ignore[assignment,misc]
    before, _here.moment = getattr(_here, "moment", None), moment
    try:
        yield
    finally:
        _here.moment = before
        with _changing:
            clock = _clocks.pop()
            if not _clocks:
                library.datetime = clock  # type: ignore[misc]


def read_template(setting: str) -> str:
    """A chat template given as text or as the path of a .jinja file."""
    if "{%" in setting or "{{" in setting:
        return setting
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"dataset.chat_template: cannot read {setting} ({error})") from error


def template_name(setting: str | None) -> str:
    """The chat template in words."""
    if setting is None:
        return "the tokenizer's chat template"
    return "dataset.chat_template" + ("" if "{%" in setting or "{{" in setting else f" ({setting})")


def date_note(template: object, moment: datetime) -> str | None:
    """What a person should know about the date in a chat template."""
    if "strftime_now" not in str(template):
        return None
    return (
        f"the chat template writes the date: it is {moment:%Y-%m-%d} in all rows of this run, when resumed and "
        "measured as well; a server writes its own"
    )


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}},
    },
}  # for templates that take no conversation without tools


def write_somehow(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], kwargs: Mapping[str, Any] = _NOTHING
) -> str:
    """A conversation that was made up to see how a template writes it: without tools, or with one if it must have some.

    Raises:
        BadRowError: the template refuses it both ways.
    """
    try:
        return write(tokenizer, messages, None, kwargs)
    except BadRowError:
        return write(tokenizer, messages, [TOOL], kwargs)


def draws_at_random(template: object) -> bool:
    """Whether a chat template gives another text each time."""
    return bool(re.search(r"\|\s*random\b|\blipsum\s*\(", str(template or "")))


def write(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    kwargs: Mapping[str, Any] = _NOTHING,
    *,
    answer: bool = False,
) -> str:
    """The conversation as the chat template writes it; `answer` adds the generation prompt.

    Args:
        tokenizer: with the chat template.
        messages, tools: as the template takes them.
        kwargs: further variables of the template.
        answer: an answer is asked for.

    Raises:
        BadRowError: the template refuses the conversation.
    """
    refusal = UsageError(f"the chat template takes more than {SECONDS:g} s for a conversation; {ADVICE}")
    try:
        with limited(SECONDS, refusal), in_bounds():
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=answer, **kwargs
                )
            )
    except DynloraError:
        raise
    except Exception as error:  # whatever the program of whoever made the tokenizer raises
        said = str(error) or type(error).__name__
        way = _without_system(tokenizer, messages, tools, kwargs)
        raise BadRowError(f"the chat template refuses this conversation ({said}){way}") from error


def _without_system(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    kwargs: Mapping[str, Any],
) -> str:
    """What to do about a conversation that was refused for its system message, as Gemma 2's template does."""
    others = [message for message in messages if message.get("role") not in ("system", "developer")]
    if not others or len(others) == len(messages):
        return ""
    try:
        write(tokenizer, others, tools, kwargs)
    except BadRowError:
        return ""
    return "; it takes no system message: put those words into the first question"


def marked(value: Any, marker: str = MARKER) -> Any:
    """A value of a message with other text in it; what ties messages together stays."""
    if isinstance(value, Mapping):
        return {key: part if key in _LINKS else marked(part, marker) for key, part in value.items()}
    if isinstance(value, list) and value:
        return [marked(part, marker) for part in value]
    return marker


class Unwritten:
    """Fields of messages that a chat template leaves out, found by changing one at a time and writing anew.

    Each field is looked at once for each role, so rows of one kind cost what one row costs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._written: set[tuple[str, str]] = set()
        self._looks: dict[tuple[str, str], int] = {}

    def look(self, turns: Turns, text: str) -> None:
        """Look at the fields of a conversation that are new.

        Args:
            turns: the conversation.
            text: it as the chat template writes it.

        Raises:
            BadRowError: the template leaves out what is to be learned, or asked.
        """
        kinds = {_kind(message, key): None for message in turns.messages for key, value in message.items() if value}
        kinds |= {("", "tools"): None} if turns.tools else {}
        for kind in kinds:
            ties = kind[1] in _LINKS or kind == ("tool", "name")
            if kind in self._written or ties or self._looks.get(kind, 0) >= _LOOKS:
                continue
            if self._shows(turns, text, *kind):
                self._written.add(kind)
                continue
            self._looks[kind] = self._looks.get(kind, 0) + 1
            self._refuse(*kind)

    @property
    def known(self) -> tuple[set[tuple[str, str]], dict[tuple[str, str], int]]:
        """The fields that are written, and how often others were looked at: by this the next rows are looked at."""
        return self._written, self._looks

    @known.setter
    def known(self, known: tuple[set[tuple[str, str]], dict[tuple[str, str], int]]) -> None:
        self._written, self._looks = set(known[0]), dict(known[1])

    def fields(self) -> list[str]:
        """The fields that were left out, in words."""
        lost = sorted(kind for kind in self._looks if kind not in self._written)
        return [_in_words(role, key) for role, key in lost]

    def _shows(self, turns: Turns, text: str, role: str, key: str) -> bool:
        if key == "tools":
            variants = [(turns.messages, marked(turns.tools)), (turns.messages, None)]
        else:
            one, other = [], []
            for message in turns.messages:
                ours = key in message and _kind(message, key) == (role, key)
                one.append(message | {key: marked(message[key])} if ours else message)
                gone = {name: value for name, value in message.items() if name != key}
                other.append((gone if key != "content" else message | {key: ""}) if ours else message)
            variants = [(one, turns.tools), (other, turns.tools)]
        for messages, tools in variants:
            try:
                if write(self._tokenizer, messages, tools, turns.told.kwargs) != text:
                    return True
            except BadRowError:  # it reads the field, or it would not mind
                return True
        return False

    def _refuse(self, role: str, key: str) -> None:
        """Say no where what is left out is the lesson."""
        if role == "assistant" and key in _CALLS:
            raise BadRowError(
                f"the chat template leaves out {key!r}: the model would learn to say nothing where it should call; "
                "set dataset.chat_template to one that writes calls, such as that of an instruct model made for tools, "
                "or take the calls out of the rows"
            )
        if role == "user" and key == "content":
            raise BadRowError(f"the chat template leaves out what the user says; {ADVICE}")


def _kind(message: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Role and field. Words beside a call are a kind of their own: some templates write only the call."""
    role = str(message.get("role"))
    beside = role == "assistant" and key == "content" and any(message.get(calls) for calls in _CALLS)
    return ("assistant with calls" if beside else role), key


def _in_words(role: str, key: str) -> str:
    if key == "tools":
        return "'tools'"
    if role == "assistant with calls":
        return "what the assistant says beside a call"
    return f"messages of role {role!r}" if key == "content" else f"{key!r} of role {role!r}"
