"""Numbers out of what a model did on every row: the mean loss, perplexity, accuracy, F1 and Matthews.

Everything here is a pure function of arrays; what made them, and on what, is not its business.

Dimensions: R rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowSums:
    """What a model did on every row, in the order of the rows.

    Attributes:
        loss_R: nats, summed over a row's targets; fp64.
        targets_R: number of targets: supervised tokens, or 1 for a classifier.
        correct_R: number of targets that were the most likely choice.
        predicted_R: the choice for each row of one target; None where nobody asked for it.
        numbers: what an objective tells of each row beside its loss, by name [R]; NaN where a row has none of it.
        beside: numbers over all rows that their judge tells beside the loss.
    """

    loss_R: NDArray[np.float64]
    targets_R: NDArray[np.int64]
    correct_R: NDArray[np.int64]
    predicted_R: NDArray[np.int64] | None = None
    numbers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        return int(self.targets_R.sum())

    @property
    def loss(self) -> float:
        """Mean over all targets, so that every token weighs the same whatever the row it stands in; nats."""
        return float(self.loss_R.sum() / self.targets)

    @property
    def accuracy(self) -> float:
        """Share of targets that were the most likely choice."""
        return float(self.correct_R.sum() / self.targets)


def means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Means of numbers of rows, of those that some row has.

    Where a row has but one of two rewards, the `margin` is the difference of their means, as KTO's is.

    Args:
        sums: over rows, by name.
        counts: of the rows that each is a sum over.
    """
    found = {name: total / counts[name] for name, total in sums.items() if counts[name]}
    if "margin" not in found and {"reward_chosen", "reward_rejected"} <= found.keys():
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    return found


def means_of(numbers_R: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The same of rows, NaN where one has none of it."""
    sums = {name: float(np.nansum(of_R)) for name, of_R in numbers_R.items()}
    return means(sums, {name: float((~np.isnan(of_R)).sum()) for name, of_R in numbers_R.items()})


def perplexity(loss: float) -> float:
    """exp(loss), kept finite."""
    return math.exp(min(loss, 700.0))


def confusion(truth_R: NDArray[np.int64], predicted_R: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Rows counted by their class (line) and by what was predicted (column), [K, K]."""
    counts_KK = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts_KK, (truth_R, predicted_R), 1)
    return counts_KK


def classification(counts_KK: NDArray[np.int64]) -> dict[str, Any]:
    """Accuracy, macro-averaged F1 and Matthews' correlation of a confusion matrix.

    Classes that neither occur nor are predicted do not count in F1. A correlation without variance is 0. Both as
    scikit-learn has it. Source of the correlation for many classes: Gorodkin, Comparing two K-category assignments by
    a K-category correlation coefficient, 2004.

    Args:
        counts_KK: truth in lines, predictions in columns.

    Returns:
        accuracy (0 to 1), f1 (0 to 1), matthews (-1 to 1) and the matrix as `confusion`.
    """
    counts = counts_KK.astype(np.float64)
    hits_K, truth_K, predicted_K = np.diag(counts), counts.sum(1), counts.sum(0)
    met_K = truth_K + predicted_K > 0
    f1_K = 2 * hits_K[met_K] / (truth_K + predicted_K)[met_K]
    total, right = counts.sum(), hits_K.sum()
    covariance = right * total - truth_K @ predicted_K
    spread = math.sqrt(total**2 - predicted_K @ predicted_K) * math.sqrt(total**2 - truth_K @ truth_K)
    return {
        "accuracy": float(right / total),
        "f1": float(f1_K.mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
        "confusion": counts_KK.tolist(),
    }
