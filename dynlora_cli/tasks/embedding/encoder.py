"""Rows of texts to tokens, as sentence-transformers makes them: each text with its prompt before it, cut by itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Draft, Judge, Located
from dynlora_cli.data.forms import Graded, Related
from dynlora_cli.errors import DataError
from dynlora_cli.tasks.embedding import example
from dynlora_cli.tasks.embedding.pooling import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RelatedEncoder(Encoder):
    """Tokens of queries and passages.

    Args:
        tokenizer, train_on, max_length: as of `Encoder`.
        reading: the prompts.
        judge_of: makes the judge of the examples, of whether they have scores.
        says: for the person, on how vectors are made.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str,
        max_length: int,
        reading: Reading,
        judge_of: Callable[[bool], Judge],
        says: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, train_on, max_length)
        self.reading, self.judge_of, self.says = reading, judge_of, says
        self.judge: Judge | None = None
        self.scored = False
        self.scores: set[float | None] = set()  # of the rows that were read; two tell that they differ

    def notes(self, template: str) -> list[str]:  # noqa: ARG002
        says = list(self.says)
        if len(self.scores) == 1 and getattr(self.judge, "needs_differing_scores", False):
            score = f"every row has the score {next(iter(self.scores))}"
            says.append(f"{score}: model.loss cosent, which learns from scores that differ, learns nothing; set cosine")
        return says

    def encode(self, rows: list[Located]) -> list[Draft]:
        drafts = []
        for row in rows:
            form = row.form
            self._see(row.place, scored=isinstance(form, Graded), negatives=len(getattr(form, "negatives", ())))
            assert isinstance(form, (Related, Graded))
            if isinstance(form, Graded):
                texts, score = [form.first, form.second], form.score
                if len(self.scores) < 2:
                    self.scores.add(score)
            else:
                texts, score = [form.query, form.positive, *form.negatives], None
            drafts.append(Draft([], [], texts[1], score=score, others=texts))
        texts = [text for draft in drafts for text in self._prompted(draft.others)]
        whole = self._ids(texts, special=True)
        cut = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        at = 0
        for draft in drafts:
            span = slice(at, at + len(draft.others))
            at = span.stop
            lines = [ids if text.strip() else [] for ids, text in zip(cut[span], draft.others, strict=True)]
            draft.lines, draft.ids = lines, max(lines, key=len)
            draft.cut = any(len(text) > self.max_length for text in whole[span])
        return drafts

    def _see(self, place: str, *, scored: bool, negatives: int) -> None:
        """Refuse rows that the loss cannot use.

        Raises:
            DataError: they are others than those before, or lack what the loss needs.
        """
        if self.judge is None:
            try:
                self.judge, self.scored = self.judge_of(scored), scored
            except ValueError as error:
                raise DataError(f"{place}: {error}", "set model.loss: auto, or give the rows what it needs") from None
        if scored != self.scored:
            raise DataError(
                f"{place}: pairs with a score among pairs without one",
                "train on one kind at a time; rows with a score need columns for two texts and `score`",
            )
        if getattr(self.judge, "needs_negatives", False) and not negatives:
            raise DataError(f"{place}: model.loss triplet needs a negative in every row", "set model.loss: mnrl")

    def _prompted(self, texts: Sequence[str]) -> list[str]:
        """With their prompts; a prompt for queries goes before the first text, and that for passages before others."""
        before = [self.reading.query_prompt, *[self.reading.passage_prompt] * (len(texts) - 1)]
        found = [prompt + text for prompt, text in zip(before, texts, strict=True)]
        return [text.lower() for text in found] if self.reading.lower_case else found

    def example(self, draft: Draft, row: int) -> example.Related:
        lines = [array("i", text) for text in draft.lines]
        return example.Related(lines, row, self.judge, draft.score, draft.confidence)
