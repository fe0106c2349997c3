"""Neutral forms to token ids and labels: what every task needs for it.

Encoder          tokens of texts, with the tokenizer's own opening and ending
TwoTextEncoder   a prompt for an encoder, an answer for a decoder
ClassEncoder     a text and its class
TextEncoder      (encode_text.py) one text, of which some tokens are trained
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from dynlora_cli.data.examples import Classified, Draft, Example, Located, TwoTexts
from dynlora_cli.data.forms import Labelled, Pair
from dynlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(ABC):
    """Turns neutral forms into drafts, and drafts into examples.

    Args:
        tokenizer: of the model to be trained.
        train_on: auto | completion | assistant | all.
        max_length: tokens of the longest example.

    Attributes:
        joins: a prompt and its completion become one text.
        reads: tokens that the model can read at all, for texts that are no examples; None: nobody says.

    Raises:
        DataError: the tokenizer cannot do what the rows need.
    """

    joins: ClassVar[bool] = False
    reads: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.max_length = max_length
        self.opening = self._opening()
        self.glue = self._glue()

    @property
    def closes_turns(self) -> bool:
        """Whether conversations end with a token of their template, at which generation can stop."""
        return True

    @abstractmethod
    def encode(self, rows: list[Located]) -> list[Draft]:
        """Drafts of rows that all have the same form, in order."""

    @abstractmethod
    def example(self, draft: Draft, row: int) -> Example:
        """A draft as an example, cut to `max_length`; `row` is its number."""

    def apart(self, row: Located) -> list[Located]:
        """The rows that one row is; it alone, but where a pair of answers is two of them."""
        return [row]

    def settle(self, examples: Sequence[Example], prompts: Sequence[bytes]) -> None:  # noqa: ARG002
        """Give examples of one list what they need of each other; most need nothing. `prompts` tells theirs apart."""
        return

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt that is bare text, as they stand before its completion in training."""
        return self._opened(self._ids([text])[0])

    def pieces(self, place: str, text: str) -> list[Draft]:  # noqa: ARG002
        """A text file as consecutive pieces; only asked of a task whose forms include `Plain`."""
        raise DataError(f"{place}: this task does not learn from text files", "name a file of rows")

    def notes(self, template: str) -> list[str]:  # noqa: ARG002
        """What a person should know about the rows that were read; `template` is their chat template in words."""
        return []

    def _ids(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        # verbose=False: a text longer than the model's context is cut later, and counted.
        return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer has no end-of-text token", "set eos_token in its tokenizer_config.json")
        return int(end)

    def _opening(self) -> list[int]:
        """What the tokenizer puts before a text: [bos] or nothing."""
        bare, full = self._ids(["x"])[0], self.tokenizer("x")["input_ids"]
        starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return list(full[: next(starts, 0)])

    def _glue(self) -> str:
        """A text to put before a continuation while it is tokenised, where the tokenizer would add a space to it."""
        a, b = self._ids(["a", "b"])
        joined = decode(self.tokenizer, a + b)
        return "" if joined == "ab" else "\n"

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that continue another text: no space that is not theirs is put before them."""
        if not self.glue:
            return self._ids(texts)
        (glue,) = self._ids([self.glue])
        glued = self._ids([self.glue + text for text in texts])
        alone = self._ids(texts)
        return [ids[len(glue) :] if ids[: len(glue)] == glue else bare for ids, bare in zip(glued, alone, strict=True)]

    def _opened(self, ids: list[int]) -> list[int]:
        """With the opening token, unless the text spells it out itself."""
        return ids if ids[: len(self.opening)] == self.opening else self.opening + ids

    def _ended(self, ids: list[int]) -> list[int]:
        """With the end-of-text token, unless the text spells it out itself."""
        return ids if ids[-1:] == [self._end()] else [*ids, self._end()]

    def _cut(self, texts: list[str], drafts: list[Draft]) -> list[list[int]]:
        """Tokens of whole texts, no longer than `max_length`; a draft whose text is cut is told so."""
        whole = self._ids(texts, special=True)
        for draft, ids in zip(drafts, whole, strict=True):
            draft.cut = len(ids) > self.max_length
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]


class TwoTextEncoder(Encoder):
    """Prompts and answers each with the tokenizer's own special tokens, and cut by it: none of those is lost."""

    def encode(self, rows: list[Located]) -> list[Draft]:
        pairs = [row.form for row in rows if isinstance(row.form, Pair)]
        drafts = [Draft([], [], pair.prompt) for pair in pairs]
        prompts = self._cut([pair.prompt for pair in pairs], drafts)
        answers = self._ids([pair.completion for pair in pairs], special=True)
        for draft, prompt, answer in zip(drafts, prompts, answers, strict=True):
            draft.ids, draft.labels = prompt, self._ended(answer)
        return drafts

    def prompt(self, text: str) -> list[int]:
        return self._ids([text], special=True)[0]

    def example(self, draft: Draft, row: int) -> TwoTexts:
        ids, labels = draft.ids[: self.max_length], draft.labels[: self.max_length]
        return TwoTexts(array("i", ids), array("i", labels), row, draft.confidence)


class ClassEncoder(Encoder):
    """Texts of a classifier, cut by the tokenizer itself, which keeps its special tokens.

    The class is a number of the example's once all classes are known, and 0 until then.
    """

    def encode(self, rows: list[Located]) -> list[Draft]:
        forms = [row.form for row in rows if isinstance(row.form, Labelled)]
        drafts = [Draft([], [], json.dumps([form.text, form.text_pair]), label=form.label) for form in forms]
        for paired in (False, True):  # one call each: only a pair has token types
            chosen = [at for at, form in enumerate(forms) if (form.text_pair is not None) == paired]
            if chosen:
                self._fill([forms[at] for at in chosen], [drafts[at] for at in chosen], paired)
        return drafts

    def _fill(self, forms: list[Labelled], drafts: list[Draft], paired: bool) -> None:
        """Give drafts their tokens; the texts all come alone, or all in pairs."""
        firsts, seconds = [form.text for form in forms], [form.text_pair or "" for form in forms] if paired else None
        whole = self.tokenizer(firsts, seconds, verbose=False)["input_ids"]
        coded = self.tokenizer(firsts, seconds, truncation=True, max_length=self.max_length)
        types = coded.get("token_type_ids") if paired else None
        for number, draft in enumerate(drafts):
            draft.ids, draft.cut = coded["input_ids"][number], len(whole[number]) > self.max_length
            draft.types = types[number] if types else None

    def example(self, draft: Draft, row: int) -> Classified:
        types = array("i", draft.types) if draft.types else None
        return Classified(array("i", draft.ids[: self.max_length]), 0, row, types, draft.confidence)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens as it is, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
