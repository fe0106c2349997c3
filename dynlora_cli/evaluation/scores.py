"""The interval of a difference of two models on the same rows.

Dimensions: R rows, S resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.tasks.scores import RowSums

RESAMPLES = 2000
CONFIDENCE = 0.95
_AT_ONCE = 1 << 21  # so many row counts of resamples are in memory at a time


def paired_difference(first: RowSums, second: RowSums, *, seed: int = 0) -> dict[str, float]:
    """How much lower or higher the loss of `first` is than that of `second` on the same rows.

    Rows, not tokens, are drawn with replacement, since the tokens of a row hang together; both models are judged on
    the same draw, so what makes a row hard for both does not widen the interval. Percentile bootstrap: Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        first, second: on the same rows in the same order.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        `loss`: mean loss of first minus that of second, nats per target; `low`, `high`: 95 % interval of it.

    Raises:
        ValueError: the rows are not the same ones.
    """
    if not np.array_equal(first.targets_R, second.targets_R):
        raise ValueError("a paired difference needs the same rows for both")
    difference_R, targets_R = first.loss_R - second.loss_R, first.targets_R.astype(np.float64)
    rows = len(difference_R)
    chance = np.random.default_rng(seed)
    share_R = np.full(rows, 1 / rows)
    drawn: list[NDArray[np.float64]] = []
    left = RESAMPLES
    while left:
        count = min(left, max(1, _AT_ONCE // rows))
        times_SR = chance.multinomial(rows, share_R, size=count).astype(np.float64)
        drawn.append((times_SR @ difference_R) / (times_SR @ targets_R))
        left -= count
    low, high = np.quantile(np.concatenate(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean = float(difference_R.sum() / targets_R.sum())
    # A few rows drawn over and over can leave the mean itself just outside by rounding.
    return {"loss": mean, "low": min(float(low), mean), "high": max(float(high), mean)}
