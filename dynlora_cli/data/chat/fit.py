"""A conversation in the form that one chat template wants: what templates disagree about, found out by trying.

arguments   of calls as objects, or as their JSON
ids         of calls: nine letters and digits where the template refuses others, as Mistral's do
roles       `developer` is `system` where the template knows only that
reasoning   in the field that the template reads, or in the content where it reads none; or dropped
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.chat.reasoning import AUTO, EMPTY_BLOCK, KEYS, PARTS, SWITCHES, found_in, thinks, with_reasoning
from dynlora_cli.data.chat.template import MARKER, write, write_somehow
from dynlora_cli.data.forms import BadRowError, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_ASK: dict[str, Any] = {"role": "user", "content": "a"}


class Fit:
    """Makes conversations as one tokenizer's chat template wants them. What was tried once is not tried again.

    Attributes:
        remarks: what was changed that a person may not expect.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, str], Any] = {}
        self.remarks: dict[str, None] = {}

    def wanted(self, turns: Turns) -> Turns:
        """The same conversation, as the template wants it."""
        kwargs = resolved(turns.told.kwargs, turns)
        turns = replace(turns, told=replace(turns.told, kwargs=kwargs))
        messages = self._reasoned(turns.messages, turns)
        messages = self._roles(messages, kwargs)
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        if calls:
            messages = self._with_ids(messages, kwargs)
            bare = "function" not in calls[0]
            if self._once(f"arguments {bare}", kwargs, lambda: self._prints(bare, kwargs)):
                messages = [_with_calls(message, _as_text) for message in messages]
        return replace(turns, messages=messages)

    def _once(self, question: str, kwargs: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        key = (question, json.dumps(kwargs, sort_keys=True, default=str))
        if key not in self._known:
            self._known[key] = answer()
        return self._known[key]

    def _text(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> str | None:
        """A conversation that was made up, as the template writes it; None: refused."""
        try:
            return write_somehow(self._tokenizer, messages, kwargs)
        except BadRowError:
            return None

    # -- reasoning -------------------------------------------------------------------------------------------------

    def reasoning_key(self, kwargs: Mapping[str, Any]) -> str:
        """The field in which the template reads reasoning; empty where it reads none."""
        return str(self._once("reasoning", kwargs, lambda: self._look_for_key(kwargs)))

    def _look_for_key(self, kwargs: Mapping[str, Any]) -> str:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        result = {"role": "tool", "content": "c", "name": "f", "tool_call_id": "call00001"}
        for key in KEYS:
            answers = {"role": "assistant", "content": "b", key: MARKER}
            calls = {"role": "assistant", "content": "", "tool_calls": [call], key: MARKER}
            for messages in ([_ASK, answers], [_ASK, calls, result]):
                if MARKER in (self._text(messages, kwargs) or ""):
                    return key
        parts = with_reasoning({"role": "assistant", "content": "b"}, MARKER, PARTS)
        text = self._text([_ASK, parts], kwargs) or ""
        # A template that prints any content prints a list as Python or JSON has it: that is no reading of parts.
        return PARTS if MARKER in text and not re.search(r"""["']thinking["']""", text) else ""

    def puts_empty_block(self, turns: Turns) -> bool:
        """Whether the template writes an empty think block into answers like those of a conversation without any."""
        kwargs = resolved(turns.told.kwargs, turns)
        return bool(self._once("empty block", kwargs, lambda: self._empty_block(kwargs)))

    def _empty_block(self, kwargs: Mapping[str, Any]) -> bool:
        try:
            asked = write(self._tokenizer, [_ASK], None, kwargs, answer=True)
        except BadRowError:
            return False
        text = self._text([_ASK, {"role": "assistant", "content": "b"}], kwargs) or ""
        return EMPTY_BLOCK.search(text.removeprefix(asked)) is not None

    def _reasoned(self, messages: list[dict[str, Any]], turns: Turns) -> list[dict[str, Any]]:
        drops, done = turns.told.reasoning == "drop", []
        for message in messages:
            reasoning, rest = found_in(message)
            if reasoning is None or drops:
                done.append(rest)
            elif key := self.reasoning_key(turns.told.kwargs):
                done.append(with_reasoning(rest, reasoning, key) if reasoning else rest)
            else:
                done.append(self._in_content(message, rest, reasoning))
        return done

    def _in_content(self, message: dict[str, Any], rest: dict[str, Any], reasoning: str) -> dict[str, Any]:
        """A message of a template that knows no reasoning: what stands in the content stays there, a field comes in."""
        if not any(message.get(key) for key in KEYS):
            return {key: value for key, value in message.items() if key not in KEYS}
        self.remarks[
            "the chat template reads no field of reasoning: it is written into the answer, as <think>...</think>"
        ] = None
        return with_reasoning(rest, reasoning, "")

    # -- roles and calls -------------------------------------------------------------------------------------------

    def _roles(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not any(message.get("role") == "developer" for message in messages):
            return messages
        knows = "developer" in str(self._tokenizer.chat_template)
        if knows or not self._once("system", kwargs, lambda: self._has_system(kwargs)):
            return messages
        self.remarks["the chat template does not know the role developer: such messages are its system messages"] = None
        return [message | {"role": "system"} if message.get("role") == "developer" else message for message in messages]

    def _has_system(self, kwargs: Mapping[str, Any]) -> bool:
        return MARKER in (self._text([{"role": "system", "content": MARKER}, _ASK], kwargs) or "")

    def _with_ids(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        ids = [call.get("id") for message in messages for call in message.get("tool_calls") or ()]
        ids += [message.get("tool_call_id") for message in messages if message.get("role") == "tool"]
        if all(isinstance(name, str) and _SHORT_ID.fullmatch(name) for name in ids):
            return messages
        if not self._once("ids", kwargs, lambda: self._wants_short_ids(kwargs)):
            return messages
        self.remarks["the chat template takes ids of nine letters and digits only: calls were numbered anew"] = None
        return _numbered(messages)

    def _wants_short_ids(self, kwargs: Mapping[str, Any]) -> bool:
        function = {"name": "f", "arguments": {"a": "b"}}

        def talk(name: str) -> list[dict[str, Any]]:
            calls = [{"id": name, "type": "function", "function": function}]
            called = {"role": "assistant", "content": "", "tool_calls": calls}
            return [_ASK, called, {"role": "tool", "content": "c", "tool_call_id": name, "name": "f"}]

        return self._text(talk("call_0123456789"), kwargs) is None and self._text(talk("call00001"), kwargs) is not None

    def _prints(self, bare: bool, kwargs: Mapping[str, Any]) -> bool:
        """Whether the template prints arguments, or joins them to other text, and so needs their JSON.

        Most write them by `tojson`, which would escape a text once more, or go through them key by key.
        """
        for arguments, means_text in (({MARKER: MARKER}, False), (json.dumps({MARKER: MARKER}), True)):
            function = {"name": "f", "arguments": arguments}
            call = function if bare else {"id": "123456789", "type": "function", "function": function}
            text = self._text([_ASK, {"role": "assistant", "content": "", "tool_calls": [call]}], kwargs)
            if text is not None:
                return means_text or repr(arguments) in text
        return False


def resolved(kwargs: Mapping[str, Any], turns: Turns | None) -> dict[str, Any]:
    """The variables of a template for one conversation; where it is only asked (None), `auto` is not said at all."""
    if not any(kwargs.get(name) == AUTO for name in SWITCHES):
        return dict(kwargs)
    kept = {name: value for name, value in kwargs.items() if name not in SWITCHES or value != AUTO}
    if turns is None:
        return kept
    there = turns.told.reasoning != "drop" and thinks(turns.messages)
    return kept | {name: there for name in SWITCHES if kwargs.get(name) == AUTO}


def _with_calls(message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [change(call) for call in message["tool_calls"]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as JSON."""
    if "function" in call:
        return call | {"function": _as_text(call["function"])}
    arguments = call.get("arguments")
    return call | {"arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}


def _numbered(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with ids of nine characters; a result without one belongs to the first call that waits for it."""
    names: dict[str, str] = {}
    waiting: list[str] = []
    count, done = 0, []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                count += 1
                calls.append(call | {"id": f"call{count:05}"})
                names[str(call.get("id"))] = f"call{count:05}"
                waiting.append(f"call{count:05}")
            message = message | {"tool_calls": calls}
        elif message.get("role") == "tool":
            name = names.get(str(message.get("tool_call_id")))
            name = name if name in waiting else (waiting[0] if waiting else None)
            if name is not None:
                waiting.remove(name)
                message = message | {"tool_call_id": name}
        done.append(message)
    return done
