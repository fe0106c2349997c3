"""What the assistant thinks before it answers: found in a message, and put where a template wants it.

Data have it as a field (`reasoning_content`, `thinking`, `reasoning`) or inside the content, as `<think>...</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PARTS = "parts"  # reasoning as a part of the content, as Mistral's templates take it
KEYS = ("reasoning_content", "thinking", "reasoning")
SWITCHES = ("enable_thinking", "thinking")  # variables of templates; `auto` says: by what each row holds
AUTO = "auto"
EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>\s*")
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
_UNOPENED = re.compile(r"(.*?)</think>(?:\n+|$)", re.DOTALL)  # a model's own answer, where the prompt has opened it


def found_in(message: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The reasoning of a message, and the message without it; None: it has none, and "" is an empty block.

    Args:
        message: with text as its content, or with parts as `with_reasoning` makes them.
    """
    if message.get("role") != "assistant":
        return None, dict(message)
    rest = {key: value for key, value in message.items() if key not in KEYS}
    if isinstance(message.get("content"), list):
        return _thought_part(message["content"]), rest | {"content": text_of_parts(message["content"])}
    named = next((text for key in KEYS if isinstance(text := message.get(key), str) and text.strip()), None)
    inside, content = _inside(str(message.get("content") or ""))
    if named is not None:
        if inside is not None and inside.strip() == named.strip():  # some write it twice
            rest["content"] = content
        return named, rest
    if inside is not None:
        rest["content"] = content
    return inside, rest


def _inside(content: str) -> tuple[str | None, str]:
    """The reasoning that stands in a content, and what is behind it."""
    block = _BLOCK.match(content)
    if block is None and "<think>" not in content and content.count("</think>") == 1:
        block = _UNOPENED.match(content)
    return (block[1].strip("\n"), content[block.end() :]) if block else (None, content)


def with_reasoning(rest: dict[str, Any], reasoning: str, key: str) -> dict[str, Any]:
    """A message with its reasoning in the field of this name, or in its content where there is no name."""
    if key == PARTS:
        said = [{"type": "text", "text": rest["content"]}] if rest["content"] else []
        return rest | {"content": [{"type": "thinking", "thinking": reasoning}, *said]}
    if key:
        return rest | {key: reasoning}
    block = "<think>\n" + reasoning.strip("\n") + "\n</think>"
    return rest | {"content": f"{block}\n\n{rest['content']}" if rest["content"] else block}


def _thought_part(parts: list[dict[str, Any]]) -> str | None:
    return next((str(part["thinking"]) for part in parts if part.get("type") == "thinking"), None)


def text_of_parts(content: str | list[dict[str, Any]]) -> str:
    """The words of a content."""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if part.get("type") == "text")


def thinks(messages: list[dict[str, Any]]) -> bool:
    """Whether a message of the assistant holds reasoning."""
    return any(found_in(message)[0] for message in messages)


def marked_at(messages: list[dict[str, Any]], number: int, marker: str) -> list[dict[str, Any]]:
    """The messages with a marker for the reasoning of one, which has some, in the place where it stands."""
    message = messages[number]
    key = next((key for key in KEYS if message.get(key)), None)
    if isinstance(message["content"], list):
        parts = [part | {"thinking": marker} if "thinking" in part else part for part in message["content"]]
        changed = message | {"content": parts}
    elif key is None:
        inside = str(_inside(message["content"])[0])
        changed = message | {"content": message["content"].replace(inside, marker, 1)}
    else:
        changed = message | {key: marker}
    return [*messages[:number], changed, *messages[number + 1 :]]
