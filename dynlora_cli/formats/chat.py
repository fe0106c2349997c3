"""Conversations.

What it does
    Takes a list of messages and renders it with the tokenizer's own chat template. The loss is on every assistant turn,
    its end-of-turn token included.

When to use it
    For an instruction-tuned base, single-turn or multi-turn, with or without system messages and tool calls.

Columns
    `messages`: list of {role, content}; or `conversations`: list of {from, value} (ShareGPT). Optional `system`, for
    conversations that do not begin with such a turn, and `tools`, a list or its JSON.

Reference
    https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.formats._forms import BadRowError, Turns, optional_text

COLUMNS = "messages | conversations [system, tools]"
TASKS = ("causal-lm",)
PRECEDENCE = 0

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_SHAREGPT_ROLES |= {"function_call": "assistant", "observation": "tool", "function_response": "tool"}


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
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRowError("'messages' (or 'conversations') is missing, null or empty, expected a list of messages")
    messages = [_message(number, turn) for number, turn in enumerate(turns, 1)]
    system = optional_text(row, "system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Turns(messages, _tools(row.get("tools")))


def _tools(tools: Any) -> Any:
    """The tools of a conversation; ShareGPT rows have them as the text of a JSON list."""
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools or "null") or None
    except json.JSONDecodeError as error:
        raise BadRowError(f"'tools' is text and not valid JSON ({error.msg}, column {error.colno})") from None


def _message(number: int, turn: object) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"message {number} is of type {type(turn).__name__}, expected {{role, content}}")
    # Parquet fills keys that other messages have with null; templates test for presence.
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message and "role" not in message:
        message["role"] = _SHAREGPT_ROLES.get(message["from"], message.pop("from"))
        message.pop("from", None)
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise BadRowError(f"message {number} has no role (keys: {', '.join(map(str, turn))})")
    if "content" not in message and "tool_calls" in message:
        message["content"] = ""
    message["content"] = _content(number, message.get("content"))
    return message


def _content(number: int, content: object) -> str:
    """The text of a message; a list of parts (the multimodal form) is joined if all parts are text."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        kind = "missing or null" if content is None else f"of type {type(content).__name__}"
        raise BadRowError(f"message {number}: content is {kind}, expected text")
    return content
