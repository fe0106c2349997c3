"""Tokens to text, as they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # stands where the bytes of a character are not all there yet
MOST_HELD = 8  # tokens in which a character must have come to its end: it has at most four bytes
BEFORE = 6  # tokens of the prompt that decide how the first ones of an answer read


class Pieces:
    """The text of one answer, piece by piece. All pieces together are `text`.

    Decoding a token alone would lose the space before a word, or half of a character, so each piece is what the text
    of the last few tokens grows by.

    Args:
        tokenizer: decodes; special tokens are no text.
        stop_strings: the text ends before the first of them.
        before: the prompt, where the answer goes on with it in the middle of a text.

    Attributes:
        text: what was given out so far.
        stopped: a stop string has come; nothing more will be given out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.text, self.stopped = "", False
        self._ids = list(before)[-BEFORE:]
        self._known = len(self._ids)  # tokens whose text has been taken over
        self._start = 0  # of the tokens that are decoded together with new ones
        self._old = self._decoded(self._ids)  # the text of those between the two
        self._held = ""  # read, and perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """The piece that a token brings; often empty."""
        self._ids.append(token)
        grown = self._decoded(self._ids[self._start :])
        if grown.endswith(HALF) and len(self._ids) - self._known < MOST_HELD:
            return ""
        return self._take(grown)

    def finish(self) -> str:
        """What was held back, after the last token."""
        piece = ""
        if self._known < len(self._ids):
            piece = self._take(self._decoded(self._ids[self._start :]))
        if not self.stopped:
            piece += self._held
            self.text += self._held
        self._held = ""
        return piece

    def _take(self, grown: str) -> str:
        """What is new in the text of the last tokens."""
        goes_on = grown.startswith(self._old)  # else the decoder reads old bytes anew; what was given out stays
        new = grown[len(self._old) :] if goes_on else self._decoded(self._ids[self._known :])
        last = self._decoded(self._ids[self._known :])
        if last.strip():
            self._start, self._old = self._known, last
        else:  # special tokens or spaces alone: behind them some decoders would take a space away
            self._old = grown
        self._known = len(self._ids)
        return self._given(new)

    def _given(self, new: str) -> str:
        """What may be shown of it: the rest waits, should it become a stop string."""
        if self.stopped:
            return ""
        self._held += new
        places = [place for stop in self.stop_strings if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            piece, self._held = self._held[: min(places)], ""
        else:
            waits = max((_overlap(self._held, stop) for stop in self.stop_strings), default=0)
            piece, self._held = self._held[: len(self._held) - waits], self._held[len(self._held) - waits :]
        self.text += piece
        return piece

    def _decoded(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
