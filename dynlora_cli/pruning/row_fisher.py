"""The exact empirical Fisher information of component gates, row by row, in which every row may have a weight.

    F_i = Σ_n w_n (dl_n/dg_i)² / Σ_n w_n          l_n: the loss of row n, summed over its targets

`signals.GateGradients` squares the gradient of a whole step, in which rows cancel out in part. Here every row is
squared for itself, which takes hooks in each pass (lora/row_gates.py).

Dimensions: R rows of a batch, K components of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.data.rows.sequences import unsure_of
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.row_gates import batch_gates
from dynlora_cli.pruning.policy import Observer
from dynlora_cli.pruning.signals import DECAY

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example

CONFIDENCE, DOUBT = "confidence", "doubt"


class RowFisher(Observer):
    """Sums of w (dl/dg)² over rows, and of w.

    Args:
        weigh: `confidence`: w is the row's confidence c; `doubt`: it is 1 - c.
        decay: weight of all earlier optimizer steps together after one more; None: all rows count alike.
    """

    name = "rows"
    watches_training = True

    def __init__(self, weigh: str = CONFIDENCE, decay: float | None = None) -> None:
        self.weigh, self.decay = weigh, 1.0 if decay is None else decay
        super().__init__()

    @classmethod
    def of(cls, weigh: str, *, training: bool) -> RowFisher:
        """In training recent steps count more, for the components change; after it all rows count alike."""
        return cls(weigh, DECAY if training else None)

    def restart(self) -> None:
        super().restart()
        self.weight = 0.0
        self.skip()

    def skip(self) -> None:
        self._squares: Tensor | None = None  # of the step in hand, [K]
        self._weight = 0.0

    @contextmanager
    def watching(
        self,
        pool: Pool,
        batch: Batch,
        *,
        real_BT: Tensor | None = None,  # noqa: ARG002
        divisor: float = 1.0,
    ) -> Iterator[None]:
        """Within the `with` block hooks collect the gate gradients of the batch's rows."""
        if self._squares is None:
            self._squares = pool.values.new_zeros(pool.components, requires_grad=False)
        if not batch.rows:  # a process for which no rows were left; it takes part in the sum all the same
            yield
            return
        with batch_gates(pool, batch) as gates:
            yield
        weights = [c if self.weigh == CONFIDENCE else 1 - c for c in batch.confidence]
        weight_R = torch.tensor(weights, dtype=pool.values.dtype, device=pool.values.device)
        self._squares += weight_R @ (gates.gradient_RK * divisor).square()
        self._weight += sum(weights)

    def gather(self, reduce: Callable[[Tensor], Tensor]) -> None:
        if self._squares is not None:
            total = reduce(torch.cat([self._squares, self._squares.new_tensor([self._weight])]))
            self._squares, self._weight = total[:-1], total[-1].item()

    def observe(self, pool: Pool, targets: float) -> None:  # noqa: ARG002
        """Take what `watching` has collected into the sums."""
        if self._squares is not None:
            self.seen["squares"] = self.get("squares", pool) * self.decay + self._squares
            self.weight = self.weight * self.decay + self._weight
        self.skip()

    def mean(self, pool: Pool) -> Tensor:
        """F_i; zeros before the first step. [K]

        Raises:
            UsageError: rows were seen, and none has a weight.
        """
        if "squares" in self.seen and not self.weight:
            rows = "confidence 0" if self.weigh == CONFIDENCE else "confidence 1, also those that say nothing"
            raise UsageError(
                f"policy retrieval weighs rows by their {self.weigh}, and all rows have {rows}",
                "look at the column `confidence`, or weigh by the other",
            )
        return self.get("squares", pool) / (self.weight or 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.seen, "weight": torch.tensor(self.weight, dtype=torch.float64)} if self.seen else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.seen:
            self.weight = self.seen.pop("weight").item()


def weights_note(policy: str, options: Any, examples: Sequence[Example]) -> list[str]:
    """What to say about the confidences of rows and a policy, if one of the two does without the other.

    Args:
        policy: by name.
        options: its own settings.
        examples: the rows that it looks at.

    Raises:
        UsageError: it would weigh all rows by 0.
    """
    unsure = unsure_of(examples)
    if policy != "retrieval":
        return [f"{unsure} rows have a confidence, which pruning.policy: retrieval alone reads"] if unsure else []
    if unsure:
        return []
    if options.weigh == DOUBT:
        raise UsageError(
            "policy retrieval weighs rows by their doubt, 1 - confidence, and no row has a confidence below 1",
            "give the rows a column `confidence`, or leave `weigh: doubt` out",
        )
    return [
        "no row has a confidence below 1, so policy retrieval counts all alike: it is fisher, exactly and row by row"
    ]
