"""What a person asks, of a row as the model sees it: what a library is searched by, and what people are shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from dynlora_cli.data.chat.template import write
from dynlora_cli.data.examples import Example
from dynlora_cli.data.forms import BadRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for texts of a conversation; with characters that no template writes itself.
REQUEST, ANSWER = "\u2042REQUEST\u2042", "\u2042ANSWER\u2042"


class RequestTexts:
    """Takes requests out of rows: the last turn of a conversation, the prompt of a pair, else the whole text.

    Args:
        tokenizer: that made the rows; its chat template says what belongs to the template and not to the request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def of(self, example: Example) -> str:
        """The text of a row's request, without the template's own words around it."""
        prompt, answer = example.last_answer()
        ids: Sequence[int] = prompt if answer else example.input_ids
        found = self._last_turn(self._decoded(ids, keep=True)) if answer else None
        return self._decoded(ids, keep=False).strip() if found is None else found

    def in_prompt(self, text: str) -> str:
        """The text of a prompt's request, without the template's own words around it.

        Args:
            text: the prompt with its special tokens.
        """
        found = self._last_turn(text)
        return text.strip() if found is None else found

    def _last_turn(self, text: str) -> str | None:
        """What a person says last; None where the template does not show where that is."""
        opening, closing = self._around
        return _without_end(text.rpartition(opening)[2], closing).strip() if opening and opening in text else None

    def _decoded(self, ids: Sequence[int], *, keep: bool) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not keep, clean_up_tokenization_spaces=False))

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes right before a person's turn, first or later, and behind it; empty without one."""
        if not self.tokenizer.chat_template:
            return "", ""
        first = [{"role": "user", "content": REQUEST}]
        later = [*first, {"role": "assistant", "content": ANSWER}, *first]
        try:
            one, two = (write(self.tokenizer, turns, None, answer=True) for turns in (first, later))
        except BadRowError:  # a template that knows no such conversation: texts are taken as they are
            return "", ""
        before_one, closing = one.rpartition(REQUEST)[::2]
        before_two = two.rpartition(REQUEST)[0]
        return _common_end(before_one, before_two), closing


def _common_end(one: str, two: str) -> str:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(two), strict=False))
    return "".join(letter for letter, _ in alike)[::-1]


def _without_end(text: str, closing: str) -> str:
    """A text without the beginning of `closing` at its end, as much of it as there is."""
    for length in range(len(closing), 0, -1):
        if text.endswith(closing[:length]):
            return text[:-length]
    return text
