"""A request's JSON body: what it asks, and the same bytes with a few top-level values changed.

Nothing else of the body changes, not even how a number is written: a proxy that reads and writes JSON anew would turn
1.0 into 1 for somebody, and lose a key that stands twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class NoTextError(ValueError):
    """A request holds nothing that a router could read; the message says why, for whoever sent it."""


@dataclass(frozen=True)
class Body:
    """A JSON object with the places of its top-level values.

    Attributes:
        text: all of it.
        form: its value; of a key that stands twice the last, as parsers have it.
        places: begin and end of each value in `text`, by key.
        end: of the last value.
    """

    text: str
    form: dict[str, Any]
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    end: int = 0

    @classmethod
    def read(cls, raw: bytes) -> Body | None:
        """The body, or None where it is no JSON object: then it is the upstream's to say so."""
        try:
            text = raw.decode("utf-8")
            return cls(text, *_members(text))
        except (ValueError, IndexError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            return None

    def edited(self, values: Mapping[str, Any]) -> bytes:
        """The body with some top-level keys set; a key that it lacks comes last."""
        changes = [(place, json.dumps(values[key])) for key in values for place in self.places.get(key, ())]
        new = [f", {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items() if key not in self.places]
        changes.append(((self.end, self.end), "".join(new)))
        text = self.text
        for (begin, end), value in sorted(changes, reverse=True):
            text = text[:begin] + value + text[end:]
        return text.encode("utf-8")

    def asked(self) -> list[str]:
        """What a person asks: the last turn of theirs, a prompt, or several prompts that go out together.

        The same text that the keys of a library are made of (evaluation/requests.py).

        Raises:
            NoTextError: it is given as token ids.
        """
        form = self.form
        if "messages" in form:
            return [_last_turn(form["messages"])]
        for key in ("prompt", "input"):
            if key in form:
                return _texts(form[key])
        return [""]


def _members(text: str) -> tuple[dict[str, Any], dict[str, list[tuple[int, int]]], int]:
    """Values and places of the members of an object, which is all that the text holds.

    Raises:
        ValueError, IndexError: it is no such text.
    """
    form: dict[str, Any] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    at = end = _after(text, 0, "{")
    if text[at] == "}":
        _refuse_more(text, at + 1)
        return form, places, end
    while True:
        key, at = scanstring(text, _after(text, at, '"', skip=False), True)
        begin = _after(text, at, ":")
        form[key], end = _DECODER.raw_decode(text, begin)
        places.setdefault(key, []).append((begin, end))
        at = _skip(text, end)
        if text[at] == "}":
            _refuse_more(text, at + 1)
            return form, places, end
        at = _after(text, at, ",")


def _after(text: str, at: int, mark: str, *, skip: bool = True) -> int:
    """The place behind a mark, and behind the space around it."""
    at = _skip(text, at)
    if text[at] != mark:
        raise ValueError(f"no {mark} at {at}")
    return _skip(text, at + 1) if skip else at + 1


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _refuse_more(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise ValueError("more than one value")


def _last_turn(messages: Any) -> str:
    """The text of the last message that a user wrote; empty where there is none."""
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    last = next((turn for turn in reversed(turns) if turn.get("role") == "user"), {})
    return _content(last.get("content"))


def _content(content: Any) -> str:
    """A message's text: as it is, or the parts that are text, one a line."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _texts(value: Any) -> list[str]:
    """A prompt, several prompts, or the turns of the Responses API."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return [_last_turn(value)]
    if isinstance(value, list) and value:
        raise NoTextError("the prompt is given as token ids, which no router reads")
    return [""]
