"""From measured requests to a calibration: what library.json keeps, and how good it is.

    Measured      requests of known origin, their features with every update, and what each update changed
    learn         the confidence model, the threshold, and numbers on requests that the models had not seen
    Judge         the confidence model with what it needs beside the features
    Calibration   the result; plain numbers

Only the best few updates by score are candidates for a request: the others are neither measured nor activated.

Dimensions: Q requests, E updates, N pairs of both, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dynlora_cli.errors import DataError
from dynlora_cli.library.calibration import (
    Bools,
    Confidence,
    Floats,
    Threshold,
    brier,
    calibration_error,
    fit,
    folds_of,
    reliability,
    threshold,
)
from dynlora_cli.library.features import NAMES, Background, features

CANDIDATES = 3  # updates looked at for a request, the best by score
UNRELATED = -1  # as an origin
CURVE_POINTS = 60


@dataclass(frozen=True)
class Measured:
    """Requests, and what updates do on them.

    Attributes:
        names: of the updates.
        origin_Q: the update that a request belongs to, by number; -1: none.
        group_Q: requests with the same prompt have the same number.
        scores_QE: cosine with the nearest key of the update.
        overlap_QE: features.py.
        gain_QE: by how much the update lowers the summed loss of the answer, nats; NaN where it was not measured.
    """

    names: tuple[str, ...]
    origin_Q: NDArray[np.int64]
    group_Q: NDArray[np.int64]
    scores_QE: Floats
    overlap_QE: Floats
    gain_QE: Floats

    def some(self, which_Q: Bools) -> Measured:
        """Some of the requests."""
        origin_Q, group_Q = self.origin_Q[which_Q], self.group_Q[which_Q]
        scores_QE, overlap_QE, gain_QE = self.scores_QE[which_Q], self.overlap_QE[which_Q], self.gain_QE[which_Q]
        return Measured(self.names, origin_Q, group_Q, scores_QE, overlap_QE, gain_QE)

    def each(self, fold_Q: NDArray[np.int64]) -> Iterator[tuple[int, Floats, Floats]]:
        """Of each request its fold, its cosines [E] and its overlaps [E]."""
        yield from zip(fold_Q.tolist(), self.scores_QE, self.overlap_QE, strict=True)

    def background(self) -> Background:
        """Of the unrelated requests."""
        return Background.of(self.scores_QE[self.origin_Q == UNRELATED])

    def pairs(self) -> Bools:
        """[Q, E]: candidates whose outcome is known; of an unrelated request it always is."""
        known_QE = np.isfinite(self.gain_QE) | (self.origin_Q == UNRELATED)[:, None]
        return candidates(self.scores_QE) & known_QE

    def helped(self) -> Bools:
        """[Q, E]: the update lowers the loss, on a request that some update is about."""
        return (np.nan_to_num(self.gain_QE) > 0) & (self.origin_Q != UNRELATED)[:, None]


def candidates(scores_QE: Floats, most: int = CANDIDATES) -> Bools:
    """[Q, E]: the best `most` updates of each request, by score; of equal ones the first."""
    place_QE = np.argsort(np.argsort(-scores_QE, axis=1, kind="stable"), axis=1, kind="stable")
    return place_QE < most


def to_measure(scores_QE: Floats, origin_Q: NDArray[np.int64]) -> Bools:
    """[Q, E]: pairs to measure, of updates' requests: candidates, the own update, candidates without it."""
    wanted_QE = candidates(scores_QE) & (origin_Q != UNRELATED)[:, None]
    related = np.flatnonzero(origin_Q != UNRELATED)
    without_own = scores_QE[related].copy()
    without_own[np.arange(len(related)), origin_Q[related]] = -np.inf
    wanted_QE[related] |= candidates(without_own)
    wanted_QE[related, origin_Q[related]] = True
    return wanted_QE


@dataclass(frozen=True)
class Judge:
    """Makes evidence of cosines and overlaps.

    Attributes:
        confidence: the model.
        background: by which cosines become scores.
    """

    confidence: Confidence
    background: Background

    @classmethod
    def learn(cls, measured: Measured) -> Judge:
        """From requests of known outcome."""
        background = measured.background()
        features_QEF = features(background.scores(measured.scores_QE), measured.overlap_QE)
        pairs_QE = measured.pairs()
        return cls(fit(features_QEF[pairs_QE], measured.helped()[pairs_QE]), background)

    def evidence(self, cosines_QE: Floats, overlap_QE: Floats) -> Floats:
        """[Q, E]: log-odds; -inf for updates that are no candidates."""
        evidence_QE = self.confidence.evidence(features(self.background.scores(cosines_QE), overlap_QE))
        return np.where(candidates(cosines_QE), evidence_QE, -np.inf)


@dataclass(frozen=True)
class Calibration:
    """What a library knows about its updates' worth.

    Attributes:
        entries: names of the updates that it has seen; others are never activated.
        judge: the model.
        threshold: evidence that an activation needs.
        at_most: updates active for one request.
        quality: numbers for people, all on requests that the models had not seen.
    """

    entries: tuple[str, ...]
    judge: Judge
    threshold: Threshold
    at_most: int
    quality: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For library.json; a threshold that nothing passes is null."""
        limit = self.threshold
        return {
            "entries": list(self.entries),
            "features": list(NAMES),
            "background": {
                name: list(pair)
                for name, *pair in zip(
                    self.entries, self.judge.background.mean, self.judge.background.spread, strict=True
                )
            },
            "model": self.judge.confidence.as_dict(),
            "threshold": {
                "evidence": limit.evidence if np.isfinite(limit.evidence) else None,
                "rate": limit.rate,
                "requests": limit.requests,
                "promised": limit.promised,
            },
            "at_most": self.at_most,
            "quality": self.quality,
        }


class _ModelForm(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    weights: tuple[float, float, float]
    intercept: float
    curve: tuple[tuple[float, float], ...] | None = Field(min_length=1)
    platt: tuple[float, float]


class _ThresholdForm(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    evidence: float | None
    rate: float = Field(ge=0, le=1)
    requests: int = Field(ge=0)
    promised: bool


_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CalibrationForm(BaseModel):
    """What library.json may hold of a calibration; anybody may have written it."""

    model_config = ConfigDict(allow_inf_nan=False)
    entries: tuple[str, ...]
    background: dict[str, tuple[float, _Spread]]
    model: _ModelForm
    threshold: _ThresholdForm
    at_most: int = Field(ge=1, le=CANDIDATES)
    quality: dict[str, Any]

    @model_validator(mode="after")
    def _whole(self) -> CalibrationForm:
        if not self.entries or set(self.background) != set(self.entries):
            raise PydanticCustomError("background", "Input should have one background for each of its entries")
        at, value = zip(*self.model.curve or [(0.0, 0.0)], strict=True)
        if list(at) != sorted(at) or list(value) != sorted(value) or not 0 <= value[0] <= value[-1] <= 1:
            raise PydanticCustomError("curve", "Input should have a curve that rises, from 0 to 1 at most")
        return self

    def calibration(self) -> Calibration:
        """The calibration that it says."""
        limit = self.threshold.model_dump()
        evidence = np.inf if limit["evidence"] is None else limit["evidence"]
        mean, spread = zip(*(self.background[name] for name in self.entries), strict=True)
        judge = Judge(Confidence(**self.model.model_dump()), Background(mean, spread))
        return Calibration(self.entries, judge, Threshold(**limit | {"evidence": evidence}), self.at_most, self.quality)


# -- learning --------------------------------------------------------------------------------------------------------


def learn(measured: Measured, *, rate: float, at_most: int = 1, others_count: bool = False) -> Calibration:
    """The calibration of a library.

    Threshold and quality are made of requests that were judged by models of the others (`folds_of`). The model that is
    kept has learned from all of them, so the rate that the threshold promises holds as far as it judges as those do.

    Args:
        measured: requests of all updates, held out from training, and unrelated ones.
        rate: of false activations that is wanted.
        at_most: updates active for one request, at most as many as there are candidates.
        others_count: a request of an update is also taken as unrelated to all others, where the best of them does
            not help on it.

    Raises:
        DataError: fewer than two different requests.
    """
    if len(set(measured.group_Q.tolist())) < 2:
        raise DataError("a calibration needs at least two different requests", "add updates with held-out rows")
    fold_Q = folds_of(measured.group_Q.tolist())
    judges = [Judge.learn(measured.some(fold_Q != fold)) for fold in range(int(fold_Q.max()) + 1)]
    evidence_QE = np.stack([judges[f].evidence(c[None], o[None])[0] for f, c, o in measured.each(fold_Q)])
    strangers_M = evidence_QE[measured.origin_Q == UNRELATED].max(1)
    if others_count and len(measured.names) > 1:
        strangers_M = np.concatenate([strangers_M, _from_others(measured, judges, fold_Q)])
    limit = threshold(strangers_M, rate)
    quality = _quality(measured, judges, fold_Q, evidence_QE, limit)
    return Calibration(measured.names, Judge.learn(measured), limit, at_most, quality)


def _from_others(measured: Measured, judges: Sequence[Judge], fold_Q: NDArray[np.int64]) -> Floats:
    """The most evidence on requests of updates in a library without their own, where what it speaks for is no help."""
    found = []
    for row in np.flatnonzero(measured.origin_Q != UNRELATED):
        others = np.arange(len(measured.names)) != measured.origin_Q[row]
        judge = judges[fold_Q[row]]
        alone = Judge(judge.confidence, judge.background.some(others))
        evidence_E = alone.evidence(
            measured.scores_QE[row : row + 1, others], measured.overlap_QE[row : row + 1, others]
        )[0]
        if measured.gain_QE[row, others][evidence_E.argmax()] <= 0:
            found.append(evidence_E.max())
    return np.array(found)


def _quality(
    measured: Measured, judges: Sequence[Judge], fold_Q: NDArray[np.int64], evidence_QE: Floats, limit: Threshold
) -> dict[str, Any]:
    """How good confidence and threshold are on requests that the models had not seen."""
    pairs_QE = measured.pairs()
    each = zip(fold_Q, evidence_QE, pairs_QE, strict=True)
    confidence_N = np.concatenate([judges[fold].confidence.probability(own[pairs]) for fold, own, pairs in each])
    helped_N = measured.helped()[pairs_QE]
    bins = reliability(confidence_N, helped_N)
    return {
        "pairs": len(confidence_N),
        "helped": float(helped_N.mean()),
        "requests": {name: int((measured.origin_Q == at).sum()) for at, name in enumerate(measured.names)},
        "unrelated": int((measured.origin_Q == UNRELATED).sum()),
        "calibration_error": calibration_error(bins),
        "brier": brier(confidence_N, helped_N),
        "brier_of_constant": brier(np.full(len(confidence_N), helped_N.mean()), helped_N),
        "reliability": [[one.pairs, one.confidence, one.helped] for one in bins],
        "at_threshold": activation(measured, evidence_QE, limit.evidence),
        "curve": activation_curve(measured, evidence_QE),
    }


def activation(measured: Measured, evidence_QE: Floats, above: float) -> dict[str, float | None]:
    """What one update at most, where its evidence is above a threshold, would have done.

    Returns:
        utility: share of the gain that the best update of every request would have had (an oracle's choice).
        false: share of unrelated requests with an activation; None without any.
        active: share of the updates' own requests with an activation.
        right: share of those activations that chose the update that the request belongs to.
    """
    best_Q, active_Q = evidence_QE.argmax(1), evidence_QE.max(1) > above
    related_Q = measured.origin_Q != UNRELATED
    gain_Q = np.nan_to_num(np.take_along_axis(measured.gain_QE, best_Q[:, None], 1)[:, 0])
    most_Q = np.maximum(np.nan_to_num(measured.gain_QE, nan=-np.inf).max(1), 0)
    had, possible = float(gain_Q[related_Q & active_Q].sum()), float(most_Q[related_Q].sum())
    count = int((related_Q & active_Q).sum())
    return {
        "utility": had / possible if possible > 0 else None,
        "false": float(active_Q[~related_Q].mean()) if (~related_Q).any() else None,
        "active": count / max(1, int(related_Q.sum())),
        "right": float((best_Q == measured.origin_Q)[related_Q & active_Q].mean()) if count else None,
    }


def activation_curve(measured: Measured, evidence_QE: Floats) -> list[dict[str, float | None]]:
    """`activation` at thresholds from the strictest to none, evenly spread over the requests."""
    strongest = np.unique(evidence_QE.max(1))[::-1]
    chosen = np.unique(np.linspace(0, len(strongest) - 1, min(CURVE_POINTS, len(strongest))).round().astype(int))
    limits = [*(float(strongest[at]) for at in chosen), float(np.nextafter(strongest[-1], -np.inf))]
    return [activation(measured, evidence_QE, limit) for limit in limits]
