"""Which characters of a rendered conversation the assistant wrote, for any chat template, without editing it.

A turn begins where the conversation before it, rendered with the generation prompt, ends; it ends where the
conversation up to and with it, rendered alone, ends. Both are prefixes of the full text under most templates, and then
what is trained is what a server asks for. Some templates rewrite what came earlier (they drop old thinking, treat the
last turn differently, or put tools before the last question). There the conversation is rendered once more with a
marker in the place of the turn's words and calls, what differs is the turn's own text, and its surroundings are found
by what they have in common with the shorter renderings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.chat.reasoning import EMPTY_BLOCK, KEYS, found_in, marked_at, text_of_parts
from dynlora_cli.data.chat.template import ADVICE, MARKER, marked, write, write_somehow
from dynlora_cli.data.forms import BadRowError, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_OWN_WORDS = ("content", *KEYS, "tool_calls", "function_call")
_END_OF_THOUGHT = re.compile(r"\s*(?:<[^<>\s]+>|\[/[A-Z_]+\])\s*")  # </think>, <|end|>, [/THINK]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LEAST = 4  # a place is recognised by at least so many characters in common


@dataclass
class Mask:
    """Finds the assistant's turns in what one tokenizer's chat template writes.

    Args:
        tokenizer: with a chat template.
        closing: what `closing_of` gives for this tokenizer.
        special: texts of its special tokens.

    Attributes:
        as_asked: all turns of the last conversation begin right behind the prompt that a server would write.
        unlike_serving: the end of a generation prompt that the rendered answer does not begin with, if there was one.
    """

    tokenizer: PreTrainedTokenizerBase
    closing: str
    special: list[str] = field(default_factory=list)
    unlike_serving: str = ""
    as_asked: bool = True

    @property
    def marks_itself(self) -> bool:
        """Whether the template says itself what the assistant writes."""
        return bool(_GENERATION.search(str(self.tokenizer.chat_template)))

    def spans(self, turns: Turns, full: str, *, only_last: bool) -> list[Span]:
        """Start and end, in characters, of the assistant turns that train, with their end-of-turn marks.

        Args:
            turns: the conversation.
            full: its text, as `write` gives it.
            only_last: give only the last assistant turn.

        Raises:
            BadRowError: the template hides or changes what the assistant said.
        """
        wanted = [number for number, message in enumerate(turns.messages) if message["role"] == "assistant"]
        spans: list[Span] = []
        self.as_asked = True
        for number in wanted[-1:] if only_last else wanted:
            if number not in turns.untrained:
                start, end = self._span(turns, number, full, spans[-1][1] if spans else 0)
                if turns.told.reasoning == "mask":
                    start = self._behind_reasoning(turns, number, full, start, end)
                spans.append((start, end))
        return self._within_blocks(spans, _blocks(self.tokenizer, turns), full) if self.marks_itself else spans

    def _span(self, turns: Turns, number: int, full: str, low: int) -> Span:
        """Start and end of the assistant turn `messages[number]` in the full text, behind the place `low`."""
        last = number == len(turns.messages) - 1
        before = self._beginning(turns, number, answer=True)
        upto = full if last else self._beginning(turns, number + 1)
        if before and upto and upto.startswith(before) and full.startswith(upto):
            start, end = len(before), len(upto)
        else:
            self.as_asked = False
            first, behind = self._own_text(turns, number, full, low)
            start = self._start(turns, number, full, before, low, first)
            end = len(full) if last else self._end(turns, number, full, behind, upto)
            self._refuse_result_inside(turns, number, full, start, end)
        if self.closing.strip() and full[:end].endswith(self.closing):
            end -= len(self.closing) - len(self.closing.rstrip())  # generation has stopped before the newline after it
        _check(turns.messages[number], full[start:end])
        return start, end

    def _refuse_result_inside(self, turns: Turns, number: int, full: str, start: int, end: int) -> None:
        """Refuse a turn that calls, in whose own text the template writes the result: nobody is to learn that.

        Gemma 4 writes what is said beside a call behind the call's result.
        """
        behind = turns.messages[number + 1 :]
        if not (behind and behind[0]["role"] == "tool" and turns.messages[number].get("tool_calls")):
            return
        messages = [*turns.messages[: number + 1], behind[0] | {"content": MARKER}, *behind[1:]]
        try:
            other = write(self.tokenizer, messages, turns.tools, turns.told.kwargs)
        except BadRowError:  # a template that reads results, such as their JSON
            return
        if MARKER in other and start <= _common(full, other) < end:
            raise BadRowError(
                f"message {number + 1}: the chat template writes the result of its call among the assistant's own "
                "words; leave out what is said beside the call"
            )

    def _behind_reasoning(self, turns: Turns, number: int, full: str, start: int, end: int) -> int:
        """Where a turn goes on behind what the assistant thinks, and behind the mark that ends that."""
        if not found_in(turns.messages[number])[0]:
            block = EMPTY_BLOCK.match(full, start, end)
            return block.end() if block else start
        messages = marked_at(turns.messages, number, MARKER)
        other = write(self.tokenizer, messages, turns.tools, turns.told.kwargs)
        if MARKER not in other:
            raise BadRowError(f"message {number + 1}: the chat template leaves out what the assistant thinks; {ADVICE}")
        first = _common(full, other)
        last = len(full) - _common(full[first:][::-1], other[first:][::-1])
        mark = _END_OF_THOUGHT.match(full, last, end)
        return mark.end() if mark else last

    def _beginning(self, turns: Turns, length: int, *, answer: bool = False) -> str | None:
        """The first `length` messages, rendered alone, or None where the template cannot render them so."""
        if length == 0:
            return None
        try:
            return write(self.tokenizer, turns.messages[:length], turns.tools, turns.told.kwargs, answer=answer)
        except BadRowError:  # such as a lone system message, or a turn whose tool result has not come yet
            return None

    def _own_text(self, turns: Turns, number: int, text: str, low: int) -> Span:
        """Where the words and calls of a message stand: the part of the text that changes when they do."""
        message = turns.messages[number]
        change = {key: marked(message[key]) for key in _OWN_WORDS if message.get(key)}
        change = change or {"content": MARKER}  # a turn of nothing
        messages = [*turns.messages[:number], message | change, *turns.messages[number + 1 :]]
        other = write(self.tokenizer, messages, turns.tools, turns.told.kwargs)
        if MARKER not in other[low:]:
            raise BadRowError(f"message {number + 1}: the chat template leaves out what the assistant says; {ADVICE}")
        start = _common(text, other)
        same_end = _common(text[start:][::-1], other[start:][::-1])
        return start, len(text) - same_end

    def _start(self, turns: Turns, number: int, full: str, before: str | None, low: int, first: int) -> int:
        """Where generation would begin: behind the generation prompt, or what there is of it."""
        if before and full[:first].startswith(before):
            return len(before)
        shown = self._beginning(turns, number)
        if not before or not shown:
            return first
        prompt = before[len(shown) :] if before.startswith(shown) else ""
        place, length = _behind(full, before, low, first)
        if length > len(prompt) and length >= min(_LEAST, len(before)):
            return place
        self.unlike_serving = self.unlike_serving or prompt
        place, length = _behind(full, shown, low, first)
        if length < min(_LEAST, len(shown)):
            return first
        return place + _whole(prompt, _common(prompt, full[place:first]))

    def _end(self, turns: Turns, number: int, full: str, behind: int, upto: str | None) -> int:
        """Where the turn's end-of-turn mark ends, for a turn whose own text ends at `behind`."""
        tail, rest = self.closing, full[behind:]
        if upto is not None:
            alone = replace(turns, messages=turns.messages[: number + 1])
            tail = upto[self._own_text(alone, number, upto, 0)[1] :]
        same = _common(tail, rest)
        if same == len(tail):
            return behind + same
        same = _whole(tail, same)
        # The last turn ends with a mark of its own, as in gpt-oss; the mark of the others stands before another mark.
        special = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)"
        other = re.compile(rf"({special})\s*({special})").match(rest, same)
        return behind + (other.end(1) if other else same)

    def _within_blocks(self, spans: list[Span], blocks: list[Span], full: str) -> list[Span]:
        """The parts of the turns that the template's own blocks hold, end-of-turn marks included."""
        kept = []
        for start, end in spans:
            parts = [(max(start, a), min(end, b)) for a, b in blocks if a < end and b > start]
            if parts and full[parts[-1][1] : end].strip() == self.closing.strip():
                parts[-1] = (parts[-1][0], end)
            kept += parts
        return kept


def closing_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant turn, such as `<|im_end|>` and a newline; may be empty.

    Raises:
        BadRowError: the template leaves out what the assistant says.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
    _, marker, after = write_somehow(tokenizer, probe).partition(MARKER)
    if not marker:
        raise BadRowError(f"the chat template leaves out what the assistant says; {ADVICE}")
    return after


def _blocks(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[Span]:
    """Start and end of the template's `{% generation %}` blocks, in characters."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {**tokenizer.special_tokens_map, **turns.told.kwargs}
    template = tokenizer.get_chat_template(None, turns.tools)
    found: Any = render_jinja_template(
        [turns.messages], turns.tools, chat_template=template, return_assistant_tokens_mask=True, **options
    )
    return [(start, end) for start, end in found[1][0]]


def _behind(text: str, reference: str, low: int, high: int) -> tuple[int, int]:
    """The place in text[low:high] that has the most text before it in common with the end of `reference`, and how much.

    Of equal places it is the last one.
    """
    end = reference[-_LEAST:]
    best = (high, 0)
    at = text.rfind(end, low, high)
    while at >= 0:
        place = at + len(end)
        same = _common(text[:place][::-1], reference[::-1])
        best = max(best, (place, same), key=lambda found: found[1])
        at = text.rfind(end, low, place - 1)
    return best


def _whole(text: str, length: int) -> int:
    """The length of a beginning of `text` without a mark or a word that is cut off."""
    if length == len(text):
        return length
    return max((match.end() for match in re.finditer(r"[\s>\]]", text[:length])), default=0)


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves, which are compared whole: texts are long, and Python is slow by the character
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _check(message: Mapping[str, Any], shown: str) -> None:
    """The span holds what the assistant said, thinking aside: many templates drop or move it."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    lost = next((name for name in names if isinstance(name, str) and name not in shown), None)
    if lost is not None:
        raise BadRowError(f"the chat template leaves out the call of {lost!r}; {ADVICE}")
    short = next((name for name, count in Counter(map(str, names)).items() if shown.count(name) < count), None)
    if short is not None:
        raise BadRowError(f"the chat template writes fewer calls of {short!r} in one turn than the row has; {ADVICE}")
    answer = text_of_parts(message["content"]).strip().rpartition("</think>")[2].strip()
    if answer not in shown and not names:
        raise BadRowError(
            f"the chat template changes what the assistant says ({answer[:40]!r} is not in its turn); {ADVICE}"
        )
