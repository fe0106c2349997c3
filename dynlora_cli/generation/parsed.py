"""What a model wrote, taken apart: what it thought, what it says, and what it calls.

The forms of calls are those of well-known models: Hermes and Qwen (`<tool_call>`, JSON or XML inside), Llama 3 (a bare
object), Mistral (`[TOOL_CALLS]`), gpt-oss (channels). What fits none of them stays text: nothing is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(r"\s*<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_XML = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|$)", re.DOTALL)
_BRACKETS = re.compile(r"\s*\[THINK\](.*?)(?:\[/THINK\]|$)(.*)", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*")
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*")
_CHANNEL = re.compile(
    r"(?:<\|start\|>)?(?:assistant)?(?: to=(?:functions\.)?(?P<to>[\w.-]+))?\s*<\|channel\|>(?P<channel>\w+)"
    r"(?: to=(?:functions\.)?(?P<also>[\w.-]+))?[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(?P<text>.*?)"
    r"(?:<\|end\|>|<\|call\|>|<\|return\|>|$)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` are JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """An answer in its parts."""

    content: str
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def parse(text: str, raw: str, *, opened: bool = False, tools: Collection[str] = ()) -> Parsed:
    """The parts of an answer.

    Args:
        text: of the answer, without special tokens.
        raw: the same with them; empty where that is not known.
        opened: the prompt has begun a thought.
        tools: names that may be called; none: calls stay text.
    """
    if "<|channel|>" in raw and "<|message|>" in raw:
        return _channels(raw, tools)
    if brackets := _BRACKETS.match(raw):  # they are special tokens, and so not in the text
        text = raw = brackets[2]
    reasoning, said = (brackets[1].strip(), text) if brackets else thought_in(text, opened=opened)
    if not tools:
        return Parsed(said, reasoning)
    if _MISTRAL.search(raw):
        before, _, behind = raw.partition("[TOOL_CALLS]")
        if calls := _mistral(behind):
            words = before if brackets else thought_in(before, opened=opened)[1]
            return Parsed(words.strip(), reasoning, calls)
    calls = [call for block in _BLOCK.finditer(said) for call in _in_block(block[1])]
    if calls and len(calls) >= said.count("<tool_call>"):
        return Parsed(_BLOCK.sub("", said).strip(), reasoning, calls)
    bare = _object(said.strip().removeprefix("<|python_tag|>"))
    if bare is not None and bare.name in tools:
        return Parsed("", reasoning, [bare])
    return Parsed(said, reasoning)


def thought_in(text: str, *, opened: bool) -> tuple[str, str]:
    """What was thought, and what is said behind it. A thought without an end goes on to the end."""
    body = text.lstrip()
    if body.startswith(OPEN):
        body = body[len(OPEN) :]
    elif not opened:
        return "", text
    else:
        body = text
    reasoning, _, said = body.partition(CLOSE)
    return reasoning.strip("\n"), said.lstrip("\n")


def _in_block(text: str) -> list[Call]:
    found = [_xml(match) for match in _XML.finditer(text)]
    call = None if found else _object(text)
    return found or ([call] if call else [])


def _xml(match: re.Match[str]) -> Call:
    arguments = {name: _value(value) for name, value in _PARAMETER.findall(match[2])}
    return Call(match[1], json.dumps(arguments, ensure_ascii=False))


def _value(text: str) -> Any:
    """A parameter: JSON where it is an object, a list, a number or a truth value, else text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _object(text: str) -> Call | None:
    """A call that is the JSON of {name, arguments} or {name, parameters}."""
    try:
        return _call(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, (dict, str)):
        return None
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _mistral(text: str) -> list[Call]:
    """Calls behind `[TOOL_CALLS]`: a list of objects, or a name and its arguments, again and again."""
    try:
        if not _NAMED.match(text):
            listed = json.JSONDecoder().raw_decode(text.strip())[0]
            found = [_call(one) for one in (listed if isinstance(listed, list) else [listed])]
        else:
            found = []
            for part in text.split("[TOOL_CALLS]"):
                name = _NAMED.match(part)
                value = json.JSONDecoder().raw_decode(part[name.end() :])[0] if name else None
                found.append(_call({"name": name[1], "arguments": value}) if name else None)
    except (ValueError, RecursionError):
        return []
    calls = [call for call in found if call is not None]
    return calls if len(calls) == len(found) else []


def _channels(raw: str, tools: Collection[str]) -> Parsed:
    """The messages of gpt-oss: analysis is thought, final is said, and what goes to a tool is a call."""
    thoughts, said, calls = [], [], []
    for match in _CHANNEL.finditer(raw):
        to = match["to"] or match["also"]
        if to and tools:
            calls.append(Call(to, match["text"]))
        elif match["channel"] == "analysis":
            thoughts.append(match["text"])
        else:
            said.append(match["text"])
    return Parsed("\n".join(said), "\n".join(thoughts), calls)


class Split:
    """The text of an answer as it comes, each piece as thought or as said.

    Args:
        opened: the prompt has begun a thought.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = "thought" if opened else "start"
        self._waiting = ""
        self._begun = False

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Pieces that are known now: whether it is a thought, and its text."""
        self._waiting += text
        if self._state == "start":
            body = self._waiting.lstrip()
            if OPEN.startswith(body[: len(OPEN)]) and len(body) < len(OPEN):
                return []
            if body.startswith(OPEN):
                self._state, self._waiting = "thought", body[len(OPEN) :]
            else:
                self._state, self._begun = "said", True
        if self._state == "thought":
            return self._thought()
        return self._said()

    def close(self) -> list[tuple[bool, str]]:
        """What is left at the end."""
        rest, self._waiting = self._waiting, ""
        return [(self._state == "thought", rest)] if rest.strip("\n") or (rest and self._state == "start") else []

    def _thought(self) -> list[tuple[bool, str]]:
        before, found, behind = self._waiting.partition(CLOSE)
        if found:
            self._state, self._waiting, begun, self._begun = "said", behind, self._begun, False
            last = (before if begun else before.lstrip("\n")).rstrip("\n")
            return [*([(True, last)] if last else []), *self._said()]
        ends = [size for size in range(1, len(CLOSE)) if before.endswith(CLOSE[:size])]
        known = before[: len(before) - max(ends, default=0)].rstrip("\n")
        self._waiting = before[len(known) :]
        known = known if self._begun else known.lstrip("\n")
        self._begun |= bool(known)
        return [(True, known)] if known else []

    def _said(self) -> list[tuple[bool, str]]:
        known = self._waiting if self._begun else self._waiting.lstrip("\n")
        self._begun |= bool(known)
        self._waiting = ""
        return [(False, known)] if known else []
