"""Measures the model that is in memory, with whatever is attached to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynlora_cli.errors import MeasureError
from dynlora_cli.evaluation import generation
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.evaluation.lm_eval import Harness
from dynlora_cli.evaluation.report import Found
from dynlora_cli.evaluation.rows import Rows
from dynlora_cli.models.load import Base, precision_of
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.data.batches import Batch
    from dynlora_cli.evaluation.generation import Prompt


class ByRow(Protocol):
    """What gives each row an adapter of its own, see hypernets/generated.py."""

    def see(self, batch: Batch) -> None:
        """Called before each batch that the model is given."""

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        context: int | None,
    ) -> list[str]:
        """In place of `generate`."""


@dataclass
class Measure:
    """Measures the model that is in memory at the moment, with whatever is attached to it."""

    base: Base
    rows: Rows
    prompts: list[Prompt]
    scored: int
    harness: Harness | None

    def __call__(self, name: str, by_row: ByRow | None = None) -> Found:
        """All numbers.

        Args:
            name: of the model, for messages.
            by_row: is asked before each batch, and for answers; None: what is on the model serves all rows.

        Raises:
            MeasureError: the loss is not finite.
        """
        base, rows, autocast = self.base, self.rows, precision_of(self.base)
        sums = self._sums(name, by_row) if rows.examples else None
        classes = int(base.model.config.num_labels or 0)
        metrics = rows.task.metrics(sums, rows.examples, classes) if sums else {}
        answers: list[str] = []
        tasks: dict[str, dict[str, float]] = {}
        with autocast():
            if self.prompts:
                answer = by_row.answers if by_row else generation.generate
                answers = answer(
                    base.model,
                    base.tokenizer,
                    self.prompts,
                    batch_size=rows.micro_batch_size,
                    context=base.files.context_length,
                )
            if self.harness:
                tasks = self.harness.run(base.model, base.tokenizer)
        if self.scored:
            references = [prompt.references for prompt in self.prompts[: self.scored]]
            metrics |= generation.metrics(answers[: self.scored], references)
        return Found(sums, metrics, answers, tasks)

    def _sums(self, name: str, by_row: ByRow | None) -> RowSums:
        batches = self.rows.batches(int(self.base.tokenizer.pad_token_id), self.base.model.device)
        if by_row:
            batches = _seen(batches, by_row)
        choices = self.rows.task.needs_choices
        sums = row_sums(self.base.model, batches, choices=choices, autocast=precision_of(self.base))
        if not math.isfinite(sums.loss):
            raise MeasureError(f"the held-out loss of {name} is {sums.loss}", "look at its weights and its dtype")
        return sums


def _seen(batches: Iterator[Batch], by_row: ByRow) -> Iterator[Batch]:
    for batch in batches:
        by_row.see(batch)
        yield batch


def has_answer(base: Base, notes: list[str]) -> bool:
    """Whether the base model's own checkpoint answers the question; a classifier's head may be new and random."""
    if base.new_head:
        notes.append("the base model has no classifier head of its own, so there is nothing to measure of it")
    return not base.new_head
