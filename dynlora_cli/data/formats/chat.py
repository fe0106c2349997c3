"""Conversations.

What it does
    Takes a list of messages and renders it with the tokenizer's own chat template. The loss is on every assistant turn,
    its end-of-turn token included, but not on turns that are marked so: `weight: 0` (OpenAI), `train: false`,
    `loss: false` or `masked: true`.

When to use it
    For an instruction-tuned base, single-turn or multi-turn, with or without system messages and tool calls.

Columns
    `messages`: list of {role, content}; or `conversations`: list of {from, value} (ShareGPT); or the JSON of such a
    list. Roles may have ShareGPT's names (human, gpt, function_call, observation) under either key. Optional `system`,
    for conversations that do not begin with such a turn, and `tools`, a list or its JSON (`functions` in OpenAI's older
    form). Arguments of calls may be objects or their JSON. A turn of function_call or tool_call (ms-swift) that holds
    the JSON of a call, or of a list of calls, is a call; any other is trained as text.

Reference
    https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.columns import mark_of
from dynlora_cli.data.forms import BadRowError, Turns, as_text, optional_text
from dynlora_cli.files.strict_json import BadJsonError, loads

COLUMNS = "messages | conversations [system, tools, functions]"
FORMS = ("Turns",)
PRECEDENCE = 0

_ROLES = dict.fromkeys(("human", "prompter"), "user")
_ROLES |= dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "ai", "bot", "model", "function_call", "tool_call"), "assistant"
)
_ROLES |= dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool")
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool", "developer")}
_CALLING = ("function_call", "tool_call")  # roles, not the keys of these names
_TRAINS, _DOES_NOT = ("weight", "train", "training", "trainable", "loss", "loss_scale"), ("masked", "mask")
_TEXTS, _THOUGHTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")  # types of parts
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # the first that is there is read
_IN_PARTS = ("train_detail", "training_detail")


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as conversations."""
    return "messages" in columns or "conversations" in columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Turns:
    """The conversation of a row.

    Args:
        row: the row, columns already renamed.
        has_template: whether the tokenizer has a chat template; here it must.

    Raises:
        BadRowError: no template, no messages, or a message without role or text.
    """
    if not has_template:
        raise BadRowError("conversations need a chat template and the tokenizer has none; set dataset.chat_template")
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = _json(repr(name), row.get(name))
    if not isinstance(turns, list) or not turns:
        kind = "missing, null or empty" if turns in (None, [], "") else f"of type {type(turns).__name__}"
        raise BadRowError(f"{name!r} is {kind}, expected a list of messages")
    read = [_message(number, turn) for number, turn in enumerate(turns, 1)]
    remarks = _remarks(row, turns, [message for message, _ in read])
    _tie(turns, [message for message, _ in read])
    system = optional_text(row, "system")
    if system and read[0][0]["role"] != "system":
        read.insert(0, ({"role": "system", "content": system}, None))
    marks = {number: mark for number, (message, mark) in enumerate(read) if message["role"] == "assistant"}
    return Turns(
        [message for message, _ in read],
        _tools(row),
        untrained=frozenset(number for number, mark in marks.items() if mark is False),
        marks_others=any(mark for number, (_, mark) in enumerate(read) if number not in marks),
        remarks=remarks,
    )


def _calls_by_role(turn: Mapping[str, Any]) -> bool:
    return str(turn.get("role") or turn.get("from")).strip().lower() in _CALLING


def _calls_in(text: Any) -> Any:
    """The calls that a turn of ShareGPT's holds as JSON; None where it holds something else."""
    try:
        found = loads(text) if isinstance(text, str) else None
    except BadJsonError:
        return None
    calls = [found] if isinstance(found, Mapping) else found
    is_call = isinstance(calls, list) and all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) and "arguments" in call for call in calls
    )
    return [{"type": "function", "function": call} for call in calls] if calls and is_call else None


def _tie(turns: list[Any], messages: list[dict[str, Any]]) -> None:
    """Give ids to calls that were read from turns, and to their results. Some templates ask for nine characters."""
    waiting: list[str] = []
    count = 0
    for turn, message in zip(turns, messages, strict=True):
        if _calls_by_role(turn) and "tool_calls" in message:
            for call in message["tool_calls"]:
                count += 1
                waiting.append(call.setdefault("id", f"call{count:05}"))
        elif message["role"] == "tool" and waiting:
            message.setdefault("tool_call_id", waiting.pop(0))


def _remarks(row: Mapping[str, Any], turns: list[Any], messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """What is read in a way that the person may not expect."""
    found = []
    if row.get("messages") is not None and row.get("conversations"):
        found.append("'conversations' is not read where there is 'messages'")
    if any(_calls_by_role(turn) and "tool_calls" not in message for turn, message in zip(turns, messages, strict=True)):
        found.append(
            "some turns that should call hold no JSON of {name, arguments}: they are trained as text, not as calls"
        )
    spoken = [message for message in messages if message["role"] == "assistant"]
    if any(
        len({message[key].strip() for key in _THOUGHT_KEYS if isinstance(message.get(key), str)} - {""}) > 1
        for message in spoken
    ):
        found.append(f"some answers have several different thoughts: of {', '.join(_THOUGHT_KEYS)} the first is read")
    contents = [message["content"].lstrip() for message in spoken]
    if any(content.startswith("<think>") and "</think>" not in content for content in contents):
        found.append("some answers open <think> and never close it, as cut ones do: they are trained as they are")
    unknown = sorted({message["role"] for message in messages} - set(_ROLES.values()))
    found += [f"turns of the role {role[:40]!r}, which is not known here, are not the assistant's" for role in unknown]
    return tuple(found)


def _json(what: str, value: Any) -> Any:
    """A value, or the JSON of it, as CSV and some Parquet files have it.

    Raises:
        BadRowError: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return loads(value or "null")
    except BadJsonError as error:
        raise BadRowError(f"{what} is text and {error.reason}") from None


def _tools(row: Mapping[str, Any]) -> Any:
    """The tools of a conversation, or the functions of an older one."""
    tools, functions = _json("'tools'", row.get("tools")), _json("'functions'", row.get("functions"))
    for name, value in (("tools", tools), ("functions", functions)):
        if value and not (isinstance(value, list) and all(isinstance(one, Mapping) for one in value)):
            kind = "a list that holds others" if isinstance(value, list) else f"of type {type(value).__name__}"
            raise BadRowError(f"{name!r} is {kind}, expected a list of objects")
    if tools or not functions:
        return tools or None
    return [{"type": "function", "function": function} for function in functions]


def _message(number: int, turn: object) -> tuple[dict[str, Any], bool | None]:
    """A message as templates take it, and whether it is marked to train; None where it has no mark."""
    if not isinstance(turn, Mapping):
        raise BadRowError(f"message {number} is of type {type(turn).__name__}, expected {{role, content}}")
    # Parquet fills keys that other messages have with null; templates test for presence.
    message = {key: value for key, value in turn.items() if value is not None}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if theirs in message and ours not in message:
            message[ours] = message.pop(theirs)
    role = message.get("role")
    if not isinstance(role, str):
        raise BadRowError(f"message {number} has no role (keys: {', '.join(map(str, turn))})")
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = message.pop("function_call")
    if _calls_by_role(message) and "tool_calls" not in message and (calls := _calls_in(message.get("content"))):
        message |= {"tool_calls": calls, "content": ""}
    message["role"] = _ROLES.get(role.strip().lower(), role)
    if message.get("tool_calls") in ([], "", "[]"):  # templates test whether the key is there
        del message["tool_calls"]
    if "tool_calls" in message:
        message["tool_calls"] = _calls(number, message["tool_calls"])
        message.setdefault("content", "")
    for key in _THOUGHT_KEYS if message["role"] == "assistant" else ():  # no template writes it, and it would be lost
        if message.get(key) and not isinstance(message[key], (str, bool)):
            kind = type(message[key]).__name__
            raise BadRowError(f"message {number}: {key} is of type {kind}, expected text")
    message["content"] = _content(number, message)
    return message, _mark(number, message)


def _mark(number: int, message: dict[str, Any]) -> bool | None:
    """Whether a message says that it is trained; the marks are taken from it, since no template should see them."""
    marks = []
    for key in [key for key in message if key in (*_TRAINS, *_DOES_NOT, *_IN_PARTS)]:
        value = message.pop(key)
        mark = mark_of(value)
        if mark not in (0, 1) or key in _IN_PARTS:
            raise BadRowError(f"message {number}: {key} is {value!r}, and a turn trains (1) or does not (0)")
        marks.append(bool(mark) == (key in _TRAINS))
    return all(marks) if marks else None


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """The calls of a message, each {type, function: {name, arguments}} or {name, arguments}; arguments are objects."""
    calls = _json(f"message {number}: its tool_calls", calls)
    if isinstance(calls, Mapping):  # one call, as function_call is
        calls = [{"type": "function", "function": calls}]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError(f"message {number}: its calls are {calls!r:.60}, expected a list of objects")
    read = []
    for call in calls:
        function = call["function"] if isinstance(call.get("function"), Mapping) else call
        if not isinstance(function.get("name"), str):
            raise BadRowError(f"message {number}: a call has no name (keys: {', '.join(map(str, function))})")
        arguments = _json(f"message {number}: the arguments of {function['name']}", function.get("arguments"))
        if not isinstance(arguments, (Mapping, type(None))):
            kind = "text" if isinstance(arguments, str) else f"of type {type(arguments).__name__}"
            raise BadRowError(f"message {number}: the arguments of {function['name']} are {kind}, expected an object")
        function = {**function, "arguments": arguments or {}}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _content(number: int, message: dict[str, Any]) -> str:
    """The text of a message. Parts are joined if all are text; what was thought goes to a field of its own.

    Raises:
        BadRowError: it holds something else than text, such as an image.
    """
    content = as_text(message.get("content"))
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "".join(_part(number, part, message) for part in content)
    if content is None and any(message.get(key) for key in _THOUGHT_KEYS):
        return ""
    if not isinstance(content, str):
        kind = "missing or null" if content is None else f"of type {type(content).__name__}"
        keys = f" (keys: {', '.join(map(str, message))})" if content is None else ""
        raise BadRowError(f"message {number}: content is {kind}, expected text{keys}")
    return content


def _part(number: int, part: Mapping[str, Any], message: dict[str, Any]) -> str:
    """The text of a part, in the forms of OpenAI, Mistral and Anthropic."""
    kind = part.get("type")
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in _THOUGHTS:
        inner = part.get(kind)
        texts = [one.get("text") for one in inner if isinstance(one, Mapping)] if isinstance(inner, list) else [inner]
        thought = "".join(text for text in texts if isinstance(text, str))
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
        return ""
    what = f"of type {kind!r}" if kind in _TEXTS or not isinstance(kind, str) else f"a part of type {kind[:40]!r}"
    raise BadRowError(
        f"message {number}: content holds {what}, and only text is read here: leave such parts out, or the whole row"
    )
