"""Prompts from the command line: a text, stdin, or the rows of a file. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from dynlora_cli import plugins
from dynlora_cli.config.sections import Source
from dynlora_cli.data.chat.ways import COLUMN, own_kwargs
from dynlora_cli.data.forms import BadRowError, Pair, Turns, refuse_half_characters, text_of
from dynlora_cli.data.row_files import READERS, TEXT_SUFFIXES, kind_of
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.text import counted

STDIN = "-"
FORMS = (
    "messages | conversations [system, tools, functions]",
    "prompt [system]",
    "instruction [input, system, history]",
    "text, which is gone on with as it is",
)
SHOWN = 8


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        content: a text, or the messages of a conversation.
        place: where it stands in a file; empty of one that was typed.
        tools: as chat templates take them.
        raw: it is gone on with as it is, without a chat template.
        bare: how it is asked where there are no turns, word for word; None: as `content`.
        kwargs: variables of the chat template that its row names.
    """

    content: str | list[dict[str, Any]]
    place: str = ""
    tools: list[Any] | None = None
    raw: bool = False
    bare: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(argument: str, stdin: TextIO) -> tuple[list[Prompt], list[str]]:
    """The prompts that an argument of the command line names, and notes.

    Args:
        argument: a text; `-` for stdin, all of which is one prompt; or a file of rows, or of one text.
        stdin: read for `-`.

    Raises:
        UsageError, DataError: there is no such file, or it holds no prompts.
    """
    if argument == STDIN:
        try:
            return [_whole(_one_line_less(stdin.read()), "stdin")], []
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: not UTF-8 text ({error.reason})", "save it as UTF-8") from None
    path = Path(argument)
    if _is_file(path, argument):
        if kind_of(path) in TEXT_SUFFIXES and path.is_file():
            return [_whole(_one_line_less(_read_text(path)), str(path))], []
        return _from_rows(path)
    return [_whole(argument)], _taken_for_text(path)


def _whole(text: str, place: str = "") -> Prompt:
    """A text as a prompt.

    Raises:
        UsageError: there is nothing in it.
    """
    if not text.strip():
        raise UsageError(f"{place}: the prompt is empty" if place else "the prompt is empty", "write something")
    return Prompt(text, place)


def _is_file(path: Path, argument: str) -> bool:
    """Whether an argument names a file of prompts: it ends as one does, and has no spaces or is there."""
    try:
        there = path.exists()
    except OSError:  # a text too long for a name
        return False
    if there and path.is_dir():
        return False
    return kind_of(path) in READERS and (there or not any(map(str.isspace, argument)))


def _taken_for_text(path: Path) -> list[str]:
    """A note that an argument is the prompt itself, where somebody may have meant a file."""
    try:
        there = path.exists()
    except OSError:  # a text too long for a name
        there = False
    if not there:
        return []
    ends = ", ".join(sorted(READERS))
    return [f"{path}: the name is the prompt, not what lies there; files of prompts end in {ends}, and - reads stdin"]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text", "save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _one_line_less(text: str) -> str:
    """A text without the newline that editors and `echo` put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _from_rows(path: Path) -> tuple[list[Prompt], list[str]]:
    notes, unread, kinds = list[str](), dict[str, None](), set[str]()
    prompts = []
    for place, row in _rows(path, notes):
        try:
            refuse_half_characters(row)
            prompt, used = _prompt(place, row)
            if own := own_kwargs(row):
                prompt, used = replace(prompt, kwargs=own), used | {COLUMN}
        except BadRowError as error:
            raise DataError(f"{place}: {error}") from None
        prompts.append(prompt)
        kinds.add("text" if prompt.raw else "other")
        unread |= dict.fromkeys(name for name in row if name not in used and row[name] not in (None, "", [], {}))
    if "text" in kinds:
        notes.append(f"{path}: rows of `text` are gone on with as they are, without a chat template")
    if unread:
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        notes.append(f"{path}: columns that are not read: {', '.join(sorted(unread)[:SHOWN])}{more}")
    ended = sum(_answered(prompt) for prompt in prompts)
    if ended:
        notes.append(f"{path}: {counted(ended, 'conversation')} end with an answer, which is asked for anew")
        prompts = [_unanswered(prompt) for prompt in prompts]
    return prompts, notes


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for table in tables(Source(path=str(path)), notes, held_out=True):
            yield from table.read()
    except UsageError as error:
        raise type(error)(error.message.removeprefix("dataset: "), error.hint) from None


def _prompt(place: str, row: Mapping[str, Any]) -> tuple[Prompt, set[str]]:
    """What a row asks, and the columns that say so."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        row = {**row, "messages": prompt}
    if row.get("messages") is not None or row.get("conversations") is not None:
        turns: Turns = plugins.load("formats", "chat").to_example(row, has_template=True)
        used = {"messages", "conversations", "system", "tools", "functions", "prompt"}
        return Prompt(turns.messages, place, turns.tools), used
    if prompt is not None:
        text, system = text_of(row, "prompt"), row.get("system")
        opening = [{"role": "system", "content": text_of(row, "system")}] if system else []
        return Prompt([*opening, {"role": "user", "content": text}] if opening else text, place), {"prompt", "system"}
    if row.get("instruction") is not None:
        alpaca, row = plugins.load("formats", "alpaca"), {**row, "output": ""}
        turns = alpaca.to_example(row, has_template=True)
        pair: Pair | None = None if row.get("history") else alpaca.to_example(row, has_template=False)
        used = {"instruction", "input", "system", "history"}
        return Prompt(turns.messages[:-1], place, bare=pair.prompt if pair else None), used
    if row.get("text") is not None:
        return Prompt(text_of(row, "text"), place, raw=True), {"text"}
    there = ", ".join(map(str, row)) or "none"
    raise BadRowError(f"no prompt in the columns {there}; one of these is read: {'; '.join(FORMS)}")


def _answered(prompt: Prompt) -> bool:
    return isinstance(prompt.content, list) and prompt.content[-1]["role"] == "assistant"


def _unanswered(prompt: Prompt) -> Prompt:
    """A conversation without the answers at its end."""
    if not _answered(prompt):
        return prompt
    messages = list(prompt.content)
    while messages and messages[-1]["role"] == "assistant":  # type: ignore[index]
        messages.pop()
    if not messages:
        raise DataError(f"{prompt.place}: the conversation asks nothing", "it needs a turn of the user")
    return replace(prompt, content=messages)  # type: ignore[arg-type]
