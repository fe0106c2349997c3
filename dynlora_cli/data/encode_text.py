"""One text of which some tokens are trained: conversations, prompts with completions, plain text.

A label is the token itself where it is trained, -100 elsewhere, at the same position: the shift by one is made where
a batch gets its targets (data/examples.py). What is trained is decided by position, never by token id, so a pad token
that equals the end-of-text token changes nothing.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from dynlora_cli.data.chat.fit import Fit
from dynlora_cli.data.chat.mask import Mask, closing_of
from dynlora_cli.data.chat.split import Reasoned
from dynlora_cli.data.chat.template import Unwritten, draws_at_random, write
from dynlora_cli.data.encode import Encoder, decode
from dynlora_cli.data.examples import IGNORED, Draft, Example, Located, OneText
from dynlora_cli.data.forms import BadRowError, Form, Pair, Plain, Turns
from dynlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Known = tuple[set[tuple[str, str]], dict[tuple[str, str], int]]  # as of `Unwritten`


@dataclass(frozen=True, slots=True)
class Findings:
    """What an encoder has found out about conversations: what decides how the next ones are read, and what adds up."""

    known: Known
    remarks: dict[str, None]
    counts: tuple[Counter[str], Counter[str], bool, bool]
    masks: bool
    unlike_serving: str


class TextEncoder(Encoder):
    """Encodes pairs, plain texts and conversations for a model that reads and continues one text."""

    joins: ClassVar[bool] = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> None:
        super().__init__(tokenizer, train_on, max_length)
        self.unwritten = Unwritten(tokenizer)
        self.fit = Fit(tokenizer)
        self.reasoned = Reasoned(tokenizer, self.fit)

    def apart(self, row: Located) -> list[Located]:
        """A conversation whose template does not write all the reasoning at once is several; any other is one row."""
        if not isinstance(row.form, Turns):
            return [row]
        try:
            return [replace(row, form=part) for part in self.reasoned.parts(row.form, train_on=self.train_on)]
        except BadRowError as error:
            self.mask  # noqa: B018 - a template that leaves out all that the assistant says is refused for that
            raise DataError(f"{row.place}: {error}") from error

    def encode(self, rows: list[Located]) -> list[Draft]:
        by_form: dict[type, Callable[[list[Located]], list[Draft]]] = {
            Pair: self._pairs,
            Plain: self._plain,
            Turns: self._turns,
        }
        return by_form[type(rows[0].form)](rows) if rows else []

    def example(self, draft: Draft, row: int) -> Example:
        ids, labels = draft.ids[: self.max_length], draft.labels[: self.max_length]
        return OneText(array("i", ids), array("i", labels), row, draft.confidence)

    @property
    def findings(self) -> Findings:
        """What was found out about conversations, row by row."""
        masks = "mask" in self.__dict__
        unlike = self.mask.unlike_serving if masks else ""
        return Findings(self.unwritten.known, dict(self.fit.remarks), self.reasoned.counts, masks, unlike)

    def forget(self, known: Known) -> None:
        """Begin anew to find out, with what is known from rows that stand before."""
        self.unwritten.known = known
        self.fit.remarks = {}
        self.reasoned = Reasoned(self.tokenizer, self.fit)
        if "mask" in self.__dict__:
            self.mask.unlike_serving = ""

    def add(self, findings: Findings) -> None:
        """What was found out by another encoder that knew what this one knows, in the rows that stand next."""
        self.unwritten.known = findings.known
        self.fit.remarks |= findings.remarks
        self.reasoned.add(findings.counts)
        if findings.masks:
            self.mask.unlike_serving = self.mask.unlike_serving or findings.unlike_serving

    def notes(self, template: str) -> list[str]:
        """What a person should know about the conversations that were read; `template` is their template in words."""
        notes = [*self.fit.remarks, *self.reasoned.notes(template)]
        if lost := self.unwritten.fields():
            notes.append(f"{template} leaves out {', '.join(lost)}: nothing is learned from that")
        if "mask" in self.__dict__ and self.mask.marks_itself:
            notes.append(f"{template} says itself what the assistant writes ({{% generation %}}): the loss is on that")
        if "mask" in self.__dict__ and self.mask.unlike_serving:
            notes.append(
                f"{template} asks for an answer with {self.mask.unlike_serving!r}, and writes answers without: "
                "the model is asked in another form than it learns from"
            )
        return notes

    def pieces(self, place: str, text: str) -> list[Draft]:
        """A text file as consecutive pieces of `max_length` tokens, the end-of-text token after the last.

        A piece begins with the last token of the piece before it, as context without a label, so every token of the
        file is a target exactly once.
        """
        self._check_plain(place)
        opening, room = self.opening, self.max_length - len(self.opening)
        stream = [*self._ids([text])[0], self._end()]
        drafts = []
        for start in range(0, max(1, len(stream) - 1), room - 1):
            piece = stream[start : start + room]
            labels = piece if start == 0 else [IGNORED, *piece[1:]]
            drafts.append(Draft(opening + piece, [IGNORED] * len(opening) + labels, prompt=repr(piece)))
        return drafts

    def _pairs(self, rows: list[Located]) -> list[Draft]:
        pairs = [row.form for row in rows if isinstance(row.form, Pair)]
        prompts = self._ids([pair.prompt for pair in pairs])
        answers = self._continuations([pair.completion for pair in pairs])
        drafts = []
        for pair, prompt, answer in zip(pairs, prompts, answers, strict=True):
            prompt, answer = self._opened(prompt), self._ended(answer)
            given = prompt if self.train_on == "all" else [IGNORED] * len(prompt)
            drafts.append(Draft(prompt + answer, given + answer, pair.prompt))
        return drafts

    def _plain(self, rows: list[Located]) -> list[Draft]:
        self._check_plain(rows[0].place)
        texts = [row.form.text for row in rows if isinstance(row.form, Plain)]
        full = [self._ended(self._opened(ids)) for ids in self._ids(texts)]
        return [Draft(ids, list(ids), text) for ids, text in zip(full, texts, strict=True)]

    def _check_plain(self, place: str) -> None:
        if self.train_on not in ("auto", "all"):
            raise DataError(
                f"{place}: dataset.train_on is {self.train_on!r}, but plain text has no {self.train_on}",
                "set dataset.train_on: all, or use a format with prompts and answers",
            )

    def _turns(self, rows: list[Located]) -> list[Draft]:
        texts, spans, prompts = [], [], []
        for row in rows:
            assert isinstance(row.form, Turns)
            try:
                form = self.fit.wanted(row.form)
                text = write(self.tokenizer, form.messages, form.tools, form.told.kwargs)
                self.unwritten.look(form, text)
                text, turns = self._as_asked(form, text, self._spans(form, text))
            except BadRowError as error:
                raise DataError(f"{row.place}: {error}") from error
            texts.append(text)
            spans.append(turns)
            prompts.append(_opening_messages(row.form.messages))
        drafts = self._masked(texts, spans, prompts)
        for row, draft, turns in zip(rows, drafts, spans, strict=True):
            draft.untaught = "" if turns or not isinstance(row.form, Turns) else _untaught(row.form)
        if spans[0] and self.train_on != "all":
            self._check_mask(rows[0].place, texts[0], spans[0], drafts[0])
        if not self.closes_turns:
            for row, draft in zip(rows, drafts, strict=True):
                self._close(row.form, draft)
        return drafts

    def _spans(self, turns: Turns, text: str) -> list[tuple[int, int]]:
        """Character spans to train on."""
        if self.train_on != "all":
            return self.mask.spans(turns, text, only_last=self.train_on == "completion")
        if not turns.untrained:
            return [(0, len(text))]
        speaks = {number for number, message in enumerate(turns.messages) if message["role"] == "assistant"}
        others = replace(turns, untrained=frozenset(speaks - turns.untrained))
        edges = [0, *itertools.chain.from_iterable(self.mask.spans(others, text, only_last=False)), len(text)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _as_asked(self, turns: Turns, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """The text and its spans, where only the last turn trains: behind the very prompt that a server would write.

        Some templates show more before an answer than behind it, such as what was thought beside a call.
        """
        if self.train_on == "all" or self.mask.as_asked or len(spans) != 1:
            return text, spans
        last = len(turns.messages) - 1
        speaks = {number for number, message in enumerate(turns.messages) if message["role"] == "assistant"}
        trains = {max(speaks, default=-1)} if self.train_on == "completion" else speaks
        if trains - turns.untrained != {last}:
            return text, spans
        (start, end), said = spans[0], turns.told.kwargs
        try:
            asked = write(self.tokenizer, turns.messages[:-1], turns.tools, said, answer=True)
            shown = write(self.tokenizer, turns.messages[:-1], turns.tools, said)
        except BadRowError:  # such as a conversation that the assistant begins
            return text, spans
        prompt = asked.removeprefix(shown)
        if asked == text[:start] or prompt in ("", asked) or not text[:start].endswith(prompt):
            return text, spans
        moved = len(asked) - start
        return asked + text[start:], [(len(asked), end + moved)]

    @cached_property
    def mask(self) -> Mask:
        """Finds the assistant's turns."""
        if draws_at_random(self.tokenizer.chat_template):
            raise DataError(
                "the chat template draws at random, so no row could be written twice alike",
                "use another dataset.chat_template",
            )
        try:
            closing = closing_of(self.tokenizer)
        except BadRowError as error:
            raise DataError(str(error)) from error
        return Mask(self.tokenizer, closing, [decode(self.tokenizer, [index]) for index in sorted(self._special_ids)])

    @property
    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}

    @cached_property
    def closes_turns(self) -> bool:
        """Whether the chat template ends an assistant turn with a special token, at which generation can stop."""
        return bool(self._special_ids & set(self._ids([self.mask.closing])[0]))

    def _close(self, form: Form, draft: Draft) -> None:
        """End a conversation with the end-of-text token where its template has no token of its own for that."""
        if not isinstance(form, Turns) or len(form.messages) - 1 in form.untrained:
            return
        if form.messages[-1]["role"] == "assistant":
            while draft.labels and draft.labels[-1] == IGNORED:  # white space after the turn
                draft.ids.pop()
                draft.labels.pop()
            draft.ids.append(self._end())
            draft.labels.append(self._end())

    def _masked(self, texts: list[str], spans: list[list[tuple[int, int]]], prompts: list[str]) -> list[Draft]:
        """Tokens of rendered texts; those that overlap a span carry a label."""
        if not self.tokenizer.is_fast:
            raise DataError(
                "conversations need a tokenizer that reports character offsets (a fast one), and this one does not",
                "use a model that comes with a tokenizer.json",
            )
        coded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        drafts = []
        for ids, offsets, turns, prompt in zip(
            coded["input_ids"], coded["offset_mapping"], spans, prompts, strict=True
        ):
            firsts, lasts = [first for first, _ in offsets], [last for _, last in offsets]
            labels = [IGNORED] * len(ids)
            for start, end in turns:
                inside = slice(bisect_right(lasts, start), bisect_left(firsts, end))
                labels[inside] = ids[inside]
            drafts.append(Draft(ids, labels, prompt))
        return drafts

    def _check_mask(self, place: str, text: str, spans: list[tuple[int, int]], draft: Draft) -> None:
        """The tokens with a label spell what the spans say; a tokenizer with wrong offsets is found here."""
        trained = [label for label in draft.labels if label != IGNORED]
        expected = _letters("".join(text[start:end] for start, end in spans))
        if expected not in _letters(decode(self.tokenizer, trained)):
            raise DataError(
                f"{place}: the assistant mask does not spell the assistant's words: the tokenizer's offsets are wrong",
                "set dataset.train_on: all, or use a newer tokenizer file",
            )


def _untaught(turns: Turns) -> str:
    """Why nothing of a conversation trains."""
    roles = sorted({message["role"] for message in turns.messages})
    if "assistant" in roles:
        return "with turns of the assistant only that are marked not to train"
    return f"without a turn of the role assistant (roles there: {', '.join(roles)})"


def _opening_messages(messages: list[dict[str, Any]]) -> str:
    """The messages up to the first of the user: conversations that begin alike share answers."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
    return json.dumps([[message["role"], message["content"]] for message in messages[: first + 1]])


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))
