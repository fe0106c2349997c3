"""Rows of answers that are compared or judged, to tokens.

The tokens are those of TRL's DPOTrainer and KTOTrainer (1.16) for the same rows: prompt and answer are one text, and
the answer begins where that text and the prompt alone first differ. In three cases TRL's are not taken:

- a tokenizer that ends every text itself ends an answer once, and a text that spells the opening token out has one
- a chat template that closes turns without a token to stop at gets the end-of-text token behind an answer
- bare answers that differ from their first letter on have no prompt in common, whatever the last letter is
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from dynlora_cli.data.chat.fit import resolved
from dynlora_cli.data.chat.template import write
from dynlora_cli.data.encode import decode
from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.examples import IGNORED, Draft, Example, Located
from dynlora_cli.data.forms import BadRowError, Judged, Preference, Said, Turns
from dynlora_cli.data.preferences.examples import Compared, Rated, mismatch
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceEncoder(TextEncoder):
    """Encodes answers that are compared or judged.

    Args:
        tokenizer, train_on, max_length: as of `Encoder`.
        pairs: two answers are compared; otherwise each is judged alone, and a pair is two rows.
    """

    joins: ClassVar[bool] = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int, *, pairs: bool) -> None:
        super().__init__(tokenizer, train_on, max_length)
        self.pairs = pairs
        self._labels: Counter[int] = Counter()  # rows that are judged alone, by whether they are good
        self._earlier: Counter[int] = Counter()  # rows by how many tokens of the prompt alone their line lacks

    def apart(self, row: Located) -> list[Located]:
        """A pair as two answers, each judged alone, where no pairs are learned; any other row as it is."""
        form = row.form
        if self.pairs or not isinstance(form, Preference) or form.untaught:
            return [row]
        both = ((form.chosen, True), (form.rejected, False))
        each = [Judged(form.prompt, said, label, form.tools, form.remarks, form.told) for said, label in both]
        return [replace(row, form=one) for one in each]

    def encode(self, rows: list[Located]) -> list[Draft]:
        texts = [text for row in rows for text in self._texts(row)]
        ids = iter(self._ids(texts))
        return [self._draft(row.form, ids_of) for row, ids_of in ((row, self._lines(row, ids)) for row in rows)]

    def example(self, draft: Draft, row: int) -> Example:
        first, start = array("i", draft.ids[: self.max_length]), draft.start
        if draft.other is not None:
            return Compared(first, array("i", draft.other[: self.max_length]), start, row, draft.confidence)
        self._labels[int(bool(draft.label))] += 1
        return Rated(first, start, bool(draft.label), row, draft.confidence)

    def settle(self, examples: Sequence[Example], prompts: Sequence[bytes]) -> None:
        mismatch(examples, prompts, self.max_length)

    def notes(self, template: str) -> list[str]:
        notes = super().notes(template)
        if len(self._labels) == 1 < self._labels.total():
            kind = "good" if self._labels[1] else "bad"
            notes.append(
                f"all {counted(self._labels.total(), 'answer')} are {kind}: nothing is held against them, and the "
                "model may drift; add rows with the other label"
            )
        if rows := self._earlier.total():
            most = max(self._earlier)
            notes.append(
                f"in {counted(rows, 'row')} a prompt with an answer behind it is written otherwise than alone: the "
                f"answer begins where the two part, up to {counted(most, 'token')} before the prompt's end"
            )
        return notes

    def _texts(self, row: Located) -> list[str]:
        """The prompt of a row alone, and before each answer."""
        form = row.form
        assert isinstance(form, (Preference, Judged))
        if isinstance(form.prompt, str):
            return [form.prompt, *(form.prompt + str(answer) for answer in _answers(form))]
        try:
            form = _in_one_mode(form)
            assert isinstance(form.prompt, list)
            alone = self.fit.wanted(Turns(list(form.prompt), form.tools, told=form.told))
            prompt = write(self.tokenizer, alone.messages, alone.tools, alone.told.kwargs, answer=True)
            return [prompt, *(self._written(form, answer) for answer in _answers(form))]
        except BadRowError as error:
            raise DataError(f"{row.place}: {error}") from error

    def _written(self, form: Preference | Judged, answer: Said) -> str:
        assert isinstance(form.prompt, list)
        assert isinstance(answer, list)
        whole = Turns([*form.prompt, *answer], form.tools, told=form.told)
        self.reasoned.refuse_lost(whole)
        turns = self.fit.wanted(whole)
        text = write(self.tokenizer, turns.messages, turns.tools, turns.told.kwargs)
        self.unwritten.look(turns, text)
        return text

    def _lines(self, row: Located, ids: Sequence[list[int]] | object) -> list[list[int]]:
        """Tokens of the prompt alone, and with each answer behind it."""
        form = row.form
        assert isinstance(form, (Preference, Judged))
        prompt, *lines = [next(ids) for _ in range(1 + len(_answers(form)))]  # type: ignore[call-overload]
        if isinstance(form.prompt, str):
            return [self._opened(prompt), *(self._ended(self._opened(line)) for line in lines)]
        ends = [answer[-1]["role"] == "assistant" for answer in _answers(form) if isinstance(answer, list) and answer]
        if all(ends) and not self.closes_turns:
            lines = [self._ended(self._stripped(line)) for line in lines]
        return [prompt, *lines]

    def _stripped(self, line: list[int]) -> list[int]:
        """Without white space at its end."""
        end = len(line)
        while end and not decode(self.tokenizer, line[end - 1 : end]).strip():
            end -= 1
        return line[:end]

    def _draft(self, form: object, lines: list[list[int]]) -> Draft:
        assert isinstance(form, (Preference, Judged))
        prompt, *answered = lines
        start = min(_shared(prompt, line) for line in answered)
        if start < len(prompt):
            self._earlier[len(prompt) - start] += 1
        first = answered[0]
        labels = [IGNORED] * start + first[start:]
        draft = Draft(first, labels, _key(form.prompt), untaught=form.untaught, start=start)
        if isinstance(form, Judged):
            draft.label = int(form.label)
        else:
            draft.other = answered[1]
            draft.untaught = draft.untaught or _alike(answered, start, self.max_length)
        return draft


def _in_one_mode(form: Preference | Judged) -> Preference | Judged:
    """A row whose answers are asked for in one mode, where the template's switch is `auto`: thinking if one thinks."""
    said = [message for one in (form.prompt, *_answers(form)) if isinstance(one, list) for message in one]
    kwargs = resolved(form.told.kwargs, Turns(said, told=form.told))
    return replace(form, told=replace(form.told, kwargs=kwargs))


def _answers(form: Preference | Judged) -> list[Said]:
    return [form.chosen, form.rejected] if isinstance(form, Preference) else [form.completion]


def _alike(lines: list[list[int]], start: int, limit: int) -> str:
    """Why a model sees no difference between two answers; empty where it sees one."""
    if lines[0] == lines[1]:
        return "whose chosen and rejected answers are the same tokens"
    same = start < limit and lines[0][:limit] == lines[1][:limit]
    return f"whose chosen and rejected answers are the same up to max_length {limit}" if same else ""


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _key(prompt: Said) -> str:
    """What a prompt is known by: rows with the same one belong on the same side of a split."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message["role"], message["content"]] for message in prompt])
