"""What a base loses on rows with one adapter or another on it, row by row.

All are measured in the same batches, whichever rows are wanted: the loss of a row depends, in its last bits, on the
rows that are padded with it. So a row that the base answers has the base's loss to the bit.

Dimensions: R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.examples import Example
from dynlora_cli.errors import MeasureError
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.evaluation.rows import MICRO_BATCH
from dynlora_cli.models.load import Base, precision_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class RowLosses:
    """Measures rows in fixed batches.

    Args:
        base: in memory, without an adapter.
        examples: the rows, at least one.
        micro_batch_size: rows of a batch.

    Attributes:
        targets_R: number of targets of each row.
    """

    def __init__(self, base: Base, examples: Sequence[Example], micro_batch_size: int = MICRO_BATCH) -> None:
        self.base, self.count = base, len(examples)
        longest = max(len(example.input_ids) for example in examples)
        self.batches = Batches.in_order(
            examples,
            micro_batch_size=micro_batch_size,
            max_length=longest,
            pad_id=int(base.tokenizer.pad_token_id),
        )
        self.targets_R = np.array([example.supervised() for example in examples])

    def of(self, adapter: Adapter | None, name: str, wanted_R: Bools | None = None) -> Floats:
        """Summed loss of each wanted row, in nats; NaN of the others.

        Args:
            adapter: on the base; None: none.
            name: of it, for messages.
            wanted_R: rows; None: all.

        Raises:
            MeasureError: a loss is not finite.
        """
        return self.under(attached(self.base.model, adapter) if adapter else nullcontext(), name, wanted_R)

    def under(
        self,
        context: AbstractContextManager[Any],
        name: str,
        wanted_R: Bools | None = None,
        watch: Callable[[Batch, Sequence[int]], None] = lambda batch, rows: None,  # noqa: ARG005
    ) -> Floats:
        """The same with whatever `context` makes of the base.

        Args:
            context: entered once, around all batches.
            name, wanted_R: as of `of`.
            watch: takes each batch before the model does, and the numbers of its rows.

        Raises:
            MeasureError: a loss is not finite.
        """
        wanted_R = np.ones(self.count, dtype=bool) if wanted_R is None else wanted_R
        loss_R = np.full(self.count, np.nan)
        numbers = self._with_wanted(wanted_R)
        if not numbers:
            return loss_R
        with context:
            sums = row_sums(self.base.model, self._batches(numbers, watch), autocast=precision_of(self.base))
        if not math.isfinite(sums.loss):
            raise MeasureError(f"the held-out loss of {name} is {sums.loss}", "look at its weights and its dtype")
        loss_R[[row for number in numbers for row in self._rows(number)]] = sums.loss_R
        return np.where(wanted_R, loss_R, np.nan)

    def _with_wanted(self, wanted_R: Bools) -> list[int]:
        """Numbers of the batches that hold a wanted row."""
        return sorted({int(row) // self.batches.micro_batch_size for row in np.flatnonzero(wanted_R)})

    def _rows(self, number: int) -> range:
        """Rows of a batch."""
        size = self.batches.micro_batch_size
        return range(number * size, min(self.count, (number + 1) * size))

    def _batches(self, numbers: Sequence[int], watch: Callable[[Batch, Sequence[int]], None]) -> Iterator[Batch]:
        for number in numbers:
            (batch,) = (each.to(self.base.model.device) for each in self.batches.step(0, number))
            watch(batch, self._rows(number))
            yield batch
