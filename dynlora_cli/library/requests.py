"""What a person asks, of a row as the model sees it: this is what finds an update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dynlora_cli.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\u2042REQUEST\u2042"  # stands for a request in a template; three stars, which no template writes
ANSWER = "\u2042ANSWER\u2042"


class RequestTexts:
    """Takes requests out of rows: the last turn of a conversation, the prompt of a pair, else the whole text.

    Args:
        tokenizer: that made the rows; its chat template says what belongs to the template and not to the request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def of(self, example: Example) -> str:
        """The text of a row's request."""
        prompt, answer = example.last_answer()
        ids: Sequence[int] = prompt if answer else example.input_ids
        for opening, closing in self._turns:
            found = self._decode(ids, keep=True)
            if answer and opening and opening in found:
                return found.rpartition(opening)[2].removesuffix(closing).strip()
        return self._decode(ids, keep=False).strip()

    def _decode(self, ids: Sequence[int], *, keep: bool) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not keep, clean_up_tokenization_spaces=False))

    @cached_property
    def _turns(self) -> list[tuple[str, str]]:
        """What the template writes right before a person's turn and behind it; none without a template."""
        if not self.tokenizer.chat_template:
            return []
        turns = [{"role": role, "content": content} for role, content in (("user", "?"), ("assistant", ANSWER))]
        turns.append({"role": "user", "content": MARK})
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # whatever a template of somebody else's makes of it: the text is taken as it is
            return []
        before, mark, closing = str(text).rpartition(MARK)
        return [(_last_opening(before.rpartition(ANSWER)[2]), closing)] if mark and ANSWER in before else []


def _last_opening(text: str) -> str:
    return text
