"""Retrieval confidence: the calibrated probability that an update lowers the loss on a request.

What we call confidence is learned, not felt. For many requests that no update was trained on, the loss of the base and
of an update were both measured; of other requests it is known that no update is about them. A pair (request, update)
has three features that cost no forward pass, and an outcome: did the update lower the loss? On a request that no update
is about the answer is no, whatever an update happens to do there: nobody wants it there.

    features     score, margin and overlap of every pair (features.py)
    fit          a logistic model of the outcome, and a curve over it: isotonic from 200 pairs on, Platt's below
    folds_of     requests in parts, each judged by a model of the others: all that is reported is made of these
    threshold    how much evidence an activation needs, so that unrelated requests are rarely activated on

Deciding needs numpy only; scikit-learn fits.

Dimensions: N pairs, F features.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import MachineError

ISOTONIC_FROM = 200  # pairs; below, a curve of two numbers is the safer one
FOLDS = 5
INSTALL = 'pip install "dynlora[library]"'

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Confidence:
    """A fitted model: features to evidence (log-odds), and evidence to a probability.

    Evidence rises with confidence and is finer: where the curve is flat, requests of one confidence keep their order.

    Attributes:
        weights: of the features.
        intercept: of the log-odds.
        curve: (evidence, probability), both rising; between points it is straight, beyond the ends it is flat. None:
            `platt` is used.
        platt: slope and intercept of a logistic curve.
    """

    weights: tuple[float, ...]
    intercept: float
    curve: tuple[tuple[float, float], ...] | None = None
    platt: tuple[float, float] = (1.0, 0.0)

    def evidence(self, features: Floats) -> Floats:
        """Log-odds of features [..., F]."""
        return features @ np.asarray(self.weights) + self.intercept

    def probability(self, evidence: Floats) -> Floats:
        """The confidence that belongs to evidence of any shape."""
        if self.curve is None:
            slope, intercept = self.platt
            return sigmoid(slope * evidence + intercept)
        at, value = zip(*self.curve, strict=True)
        return np.interp(evidence, at, value)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for library.json."""
        return {
            "weights": list(self.weights),
            "intercept": self.intercept,
            "curve": None if self.curve is None else [list(point) for point in self.curve],
            "platt": list(self.platt),
        }


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def require() -> None:
    """Refuse to calibrate without scikit-learn.

    Raises:
        MachineError: it is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise MachineError("calibration needs scikit-learn, which is not installed", INSTALL)


# -- fitting ---------------------------------------------------------------------------------------------------------


def fit(features_NF: Floats, helped_N: Bools) -> Confidence:
    """The confidence model of pairs: evidence by a logistic model, and a curve over it.

    Where all outcomes are alike there is nothing to tell them apart by: evidence is then the first feature, and the
    probability the same for all, (k + 1) / (n + 2) by Laplace's rule.

    Args:
        features_NF: of the pairs.
        helped_N: whether the update lowered the loss.

    Raises:
        ValueError: no pairs.
    """
    pairs, helpful = len(helped_N), int(helped_N.sum())
    if not pairs:
        raise ValueError("no pairs to learn a confidence from")
    if helpful in (0, pairs):
        alike = math.log((helpful + 1) / (pairs - helpful + 1))
        return Confidence((1.0, *[0.0] * (features_NF.shape[1] - 1)), 0.0, platt=(0.0, alike))
    plain = logistic(features_NF, helped_N)
    evidence_N = plain.evidence(features_NF)
    if pairs < ISOTONIC_FROM:
        return Confidence(plain.weights, plain.intercept, platt=platt(evidence_N, helped_N))
    return Confidence(plain.weights, plain.intercept, curve=isotonic(evidence_N, helped_N))


def logistic(features_NF: Floats, helped_N: Bools) -> Confidence:
    """A logistic model in which no feature speaks against an update.

    More score, margin or overlap can be worth nothing, but not less than nothing: a feature with a weight below 0 is
    left out, and the others are fitted again. The curve is none yet.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = features_NF.mean(0), features_NF.std(0)
    spread = np.where(spread > 1e-9, spread, 1.0)  # a feature that is the same for all pairs gets no weight
    scaled_NF, used = (features_NF - mean) / spread, list(range(features_NF.shape[1]))
    weights = np.zeros(len(used))
    chance = helped_N.mean()
    intercept = float(np.log(chance / (1 - chance)))
    while used:
        model = LogisticRegression().fit(scaled_NF[:, used], helped_N)
        if (model.coef_[0] >= 0).all():
            weights[used], intercept = model.coef_[0] / spread[used], float(model.intercept_[0])
            break
        used = [feature for feature, weight in zip(used, model.coef_[0], strict=True) if weight >= 0]
    return Confidence(tuple(map(float, weights)), intercept - float(mean @ weights))


def isotonic(evidence_N: Floats, helped_N: Bools) -> tuple[tuple[float, float], ...]:
    """The rising curve that fits outcomes best in squares, as its corners; pool adjacent violators.

    Source: Zadrozny and Elkan, Transforming classifier scores into accurate multiclass probability estimates, 2002.
    """
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(evidence_N, helped_N.astype(np.float64))
    return tuple(zip(map(float, model.X_thresholds_), map(float, model.y_thresholds_), strict=True))


def platt(evidence_N: Floats, helped_N: Bools) -> tuple[float, float]:
    """Slope and intercept of the logistic curve over evidence, with the softened outcomes of Platt's paper.

    Source: Platt, Probabilistic outputs for support vector machines, 1999; Newton's steps as in Lin, Lin and Weng, A
    note on Platt's probabilistic outputs, 2007.
    """
    helpful, harmful = helped_N.sum(), (~helped_N).sum()
    wanted_N = np.where(helped_N, (helpful + 1) / (helpful + 2), 1 / (harmful + 2))
    x_N2 = np.stack([evidence_N, np.ones_like(evidence_N)], 1)
    line = np.array([1.0, 0.0])
    for _ in range(100):
        p_N = sigmoid(x_N2 @ line)
        slope = x_N2.T @ (p_N - wanted_N)
        bend = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + 1e-9 * np.eye(2)
        move = np.linalg.solve(bend, slope)
        line = line - move / max(1.0, float(np.abs(move).max()))
        if np.abs(slope).max() < 1e-8 * len(wanted_N):
            break
    return float(line[0]), float(line[1])


def folds_of(groups_Q: Sequence[int], folds: int = FOLDS) -> NDArray[np.int64]:
    """[Q]: the fold of each request, so that it can be judged by a model that has seen neither it nor its like.

    Args:
        groups_Q: requests with the same prompt have the same.
        folds: at most so many.

    Raises:
        ValueError: fewer than two groups.
    """
    order = sorted(set(groups_Q))
    if len(order) < 2:
        raise ValueError("a confidence cannot be tested on fewer than two different requests")
    folds = min(folds, len(order))
    shuffled = np.random.default_rng(0).permutation(len(order))
    fold_of = {order[number]: place % folds for place, number in enumerate(shuffled)}
    return np.array([fold_of[group] for group in groups_Q])


# -- how good it is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: how many, what was said of them, and what was true."""

    pairs: int
    confidence: float
    helped: float


def reliability(confidence_N: Floats, helped_N: Bools, bins: int = 10) -> list[Bin]:
    """Pairs by rising confidence in bins of about equally many (equal mass); equal confidences share a bin."""
    _, value_N, count_V = np.unique(confidence_N, return_inverse=True, return_counts=True)
    middle_V = np.cumsum(count_V) - count_V / 2
    bin_N = np.minimum((middle_V * bins / len(confidence_N)).astype(int), bins - 1)[value_N]
    parts = [bin_N == number for number in range(bins)]
    return [
        Bin(int(part.sum()), float(confidence_N[part].mean()), float(helped_N[part].mean()))
        for part in parts
        if part.any()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: how far what was said lies from what was true, on average over pairs.

    Source: Naeini, Cooper and Hauskrecht, Obtaining well calibrated probabilities using Bayesian binning, 2015.
    """
    pairs = sum(one.pairs for one in bins)
    return sum(one.pairs * abs(one.confidence - one.helped) for one in bins) / pairs


def brier(confidence_N: Floats, helped_N: Bools) -> float:
    """Mean squared distance of confidence and outcome (Brier 1950): 0 is perfect, 0.25 is what 1/2 for all scores."""
    return float(np.mean((confidence_N - helped_N) ** 2))


# -- the threshold ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """How much evidence an activation needs: more than `evidence`.

    Attributes:
        evidence: log-odds.
        rate: of false activations that was wanted.
        requests: unrelated ones that it was set by.
        promised: whether so many are enough for that rate; if not, it is the strictest that they give.
    """

    evidence: float
    rate: float
    requests: int
    promised: bool


def threshold(strongest_M: Floats, rate: float) -> Threshold:
    """The threshold that the evidence of a new unrelated request passes with a probability of at most `rate`.

    It is the ceil((n + 1)(1 - rate))-th smallest of n: a promise for any finite n, if new requests are drawn as these
    were. With fewer than 1 / rate - 1 requests there is no such one, and the largest is taken.
    Source: split conformal prediction; Vovk, Gammerman and Shafer, Algorithmic learning in a random world, 2005.

    Args:
        strongest_M: for each unrelated request the most evidence that any update has.
        rate: between 0 and 1.
    """
    count = len(strongest_M)
    place = math.ceil(round((count + 1) * (1 - rate), 9))
    if not count:
        return Threshold(math.inf, rate, 0, False)
    ordered = np.sort(strongest_M)
    return Threshold(float(ordered[min(place, count) - 1]), rate, count, 1 <= place <= count)
