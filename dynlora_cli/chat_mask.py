"""Which characters of a rendered conversation the assistant wrote, for any chat template, without editing it.

A turn begins where the conversation before it, rendered with the generation prompt, ends; it ends where the
conversation up to and with it, rendered alone, ends. Both are prefixes of the full text under most templates. Some
rewrite what came earlier (they drop old thinking, or treat the last turn differently); there the turn's content is
found by rendering the conversation once more with a marker in its place, and comparing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynlora_cli.formats._forms import BadRowError, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKER = "\ue000"  # private use: no data holds it, no template knows it
_ADVICE = "use another dataset.chat_template, or dataset.train_on: all"


def text_of(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    """The conversation as the chat template writes it.

    Raises:
        BadRowError: the template refuses the conversation.
    """
    return _text(tokenizer, turns.messages, turns.tools)


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, full: str, closing: str, *, only_last: bool
) -> list[Span]:
    """Start and end, in characters, of the assistant turns in a conversation, with their end-of-turn marks.

    Args:
        tokenizer: with a chat template.
        turns: the conversation.
        full: its text, as `text_of` gives it.
        closing: what `closing_of` gives for this tokenizer.
        only_last: give only the last assistant turn.

    Raises:
        BadRowError: the template hides or changes what the assistant said.
    """
    wanted = [number for number, message in enumerate(turns.messages) if message["role"] == "assistant"]
    return [_span(tokenizer, turns, number, full, closing) for number in (wanted[-1:] if only_last else wanted)]


def closing_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant turn, such as `<|im_end|>` and a newline; may be empty.

    Raises:
        BadRowError: the template leaves out what the assistant says.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKER}]
    _, marker, after = _text(tokenizer, probe, None).partition(_MARKER)
    if not marker:
        raise BadRowError(f"the chat template leaves out what the assistant says; {_ADVICE}")
    return after


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, *, answer: bool = False
) -> str:
    """Render; `answer` adds the generation prompt."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer))
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRowError(f"the chat template refuses this conversation ({error})") from error


def _span(tokenizer: PreTrainedTokenizerBase, turns: Turns, number: int, full: str, closing: str) -> Span:
    """Start and end of the assistant turn `messages[number]` in the full text."""
    before = _beginning(tokenizer, turns, number, answer=True)
    upto = full if number == len(turns.messages) - 1 else _beginning(tokenizer, turns, number + 1)
    if before and upto and upto.startswith(before) and full.startswith(upto):
        start, end = len(before), len(upto)
    else:
        content_start, content_end = _content_by_marker(tokenizer, turns, number, full)
        start = len(before) if before and full[:content_start].startswith(before) else content_start
        end = content_end + _common(closing, full[content_end:])
    if closing.strip() and full[:end].endswith(closing):
        end -= len(closing) - len(closing.rstrip())  # generation has stopped before the newline after the mark
    _check(turns.messages[number], full[start:end])
    return start, end


def _beginning(tokenizer: PreTrainedTokenizerBase, turns: Turns, length: int, *, answer: bool = False) -> str | None:
    """The first `length` messages, rendered alone, or None where the template cannot render them so."""
    if length == 0:
        return None
    try:
        return _text(tokenizer, turns.messages[:length], turns.tools, answer=answer)
    except BadRowError:  # such as a lone system message, or a turn whose tool result has not come yet
        return None


def _content_by_marker(tokenizer: PreTrainedTokenizerBase, turns: Turns, number: int, full: str) -> Span:
    """Where the content of a message stands: the part of the text that changes when the content does."""
    message = turns.messages[number]
    if message.get("tool_calls"):
        raise BadRowError(f"message {number + 1}: the chat template rewrites earlier tool calls; {_ADVICE}")
    marked = [*turns.messages[:number], message | {"content": _MARKER}, *turns.messages[number + 1 :]]
    other = _text(tokenizer, marked, turns.tools)
    if _MARKER not in other:
        raise BadRowError(f"message {number + 1}: the chat template leaves out what the assistant says; {_ADVICE}")
    start = _common(full, other)
    same_end = _common(full[start:][::-1], other[start:][::-1])
    return start, len(full) - same_end


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _check(message: dict[str, Any], shown: str) -> None:
    """The span holds what the assistant said, thinking aside: many templates drop or move it."""
    content = message["content"].strip()
    answer = content.rpartition("</think>")[2].strip()
    if answer not in shown:
        raise BadRowError(
            f"the chat template changes what the assistant says ({answer[:40]!r} is not in its turn); {_ADVICE}"
        )
