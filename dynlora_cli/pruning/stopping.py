"""Early stopping of the pruning, for `rank.budget: auto`: it goes on as long as it does no harm on held-out rows.

Before an event its components are masked, not removed, and the loss is measured on the same rows with and without
them. Rows differ far more from each other than a row from itself, so the difference is paired: it is judged against
its own standard error, which a few dozen rows make small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynlora_cli.tasks.scores import RowSums

NEGLIGIBLE = 0.01  # of the loss: what all events together may cost


@dataclass
class EarlyStopping:
    """Refuses an event that raises the held-out loss; half of it is tried next, and that ends the pruning.

    Why not go on in smaller steps? Each of them would be let through, since no event sees what the removed components
    would still have learned, and together they would remove too much.

    Attributes:
        measure: the loss of every held-out row, of the model as it is.
        tolerance: what all events together may add to the loss, in nats per target; None: a percent of the loss, or
            the standard error of the change at hand where that is more.
        added: what all events so far have added to the loss. An event that lowered it counts as 0, not as credit.
        refused: whether an event was refused.
        ended: no further event will be tried.
    """

    measure: Callable[[], RowSums]
    tolerance: float | None = None
    added: float = 0.0
    refused: bool = False
    ended: bool = False

    def allows(self, before: RowSums, after: RowSums) -> tuple[bool, float]:
        """Whether the event may stand, and how much it adds to the loss. A refusal is remembered."""
        change, error = paired_change(before, after)
        limit = max(error, NEGLIGIBLE * before.loss) if self.tolerance is None else self.tolerance
        allowed = self.added + change <= limit
        if allowed:
            self.added += max(0.0, change)
        self.ended = self.refused
        self.refused |= not allowed
        return allowed, change

    def state(self) -> tuple[float, float, float]:
        """What it remembers, as numbers for a checkpoint."""
        return self.added, float(self.refused), float(self.ended)

    def go_on(self, added: float, refused: float, ended: float) -> None:
        """Go on from `state`."""
        self.added, self.refused, self.ended = added, bool(refused), bool(ended)


def paired_change(before: RowSums, after: RowSums) -> tuple[float, float]:
    """The change of the mean loss over the same rows, and its standard error, in nats per target.

    The mean over targets is a ratio of sums over rows, so the error is that of a ratio estimator.
    """
    difference_R = after.loss_R - before.loss_R
    change = float(difference_R.sum() / before.targets)
    residual_R = difference_R - change * before.targets_R
    rows = len(residual_R)
    if rows < 2:
        return change, math.inf
    return change, float(np.sqrt(rows / (rows - 1) * np.square(residual_R).sum()) / before.targets)
