"""From measured requests to a calibration: what library.json keeps, and how good it is.

    Measured      requests of known origin, their features with every update, and what each update changed
    learn         the confidence model, the threshold, and numbers on requests that the models had not seen
    Calibration   the result; plain numbers

Only the best few updates by score are candidates for a request: the others are neither measured nor activated.

Dimensions: Q requests, E updates, N pairs of both, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dynlora_cli.errors import DataError
from dynlora_cli.library.calibration import (
    Bools,
    Confidence,
    CrossFit,
    Floats,
    Threshold,
    brier,
    calibration_error,
    cross_fit,
    fit,
    reliability,
    threshold,
)
from dynlora_cli.library.features import NAMES, features

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
        scores_QE, overlap_QE: features.py.
        gain_QE: by how much the update lowers the summed loss of the answer, nats; NaN where it was not measured.
    """

    names: tuple[str, ...]
    origin_Q: NDArray[np.int64]
    group_Q: NDArray[np.int64]
    scores_QE: Floats
    overlap_QE: Floats
    gain_QE: Floats

    def features(self) -> Floats:
        """[Q, E, F]"""
        return features(self.scores_QE, self.overlap_QE)

    def without_own(self) -> Measured:
        """The requests of updates as a library without their own update sees them, as unrelated ones; E is one less."""
        related_Q = self.origin_Q != UNRELATED
        others_QE = np.arange(len(self.names)) != self.origin_Q[related_Q, None]
        shape = (int(related_Q.sum()), len(self.names) - 1)
        scores, overlap, gain = (
            array[related_Q][others_QE].reshape(shape) for array in (self.scores_QE, self.overlap_QE, self.gain_QE)
        )
        origin_Q = np.full(shape[0], UNRELATED)
        return Measured(self.names[1:], origin_Q, self.group_Q[related_Q], scores, overlap, gain)


def candidates(scores_QE: Floats, most: int = CANDIDATES) -> Bools:
    """[Q, E]: the best `most` updates of each request, by score; of equal ones the first."""
    place_QE = np.argsort(np.argsort(-scores_QE, axis=1, kind="stable"), axis=1, kind="stable")
    return place_QE < most


def to_measure(scores_QE: Floats, origin_Q: NDArray[np.int64]) -> Bools:
    """[Q, E]: the pairs whose loss is wanted: candidates, the own update, and candidates where the own is not there."""
    wanted_QE = candidates(scores_QE)
    related = np.flatnonzero(origin_Q != UNRELATED)
    without_own = scores_QE[related].copy()
    without_own[np.arange(len(related)), origin_Q[related]] = -np.inf
    wanted_QE[related] |= candidates(without_own)
    wanted_QE[related, origin_Q[related]] = True
    return wanted_QE


@dataclass(frozen=True)
class Calibration:
    """What a library knows about its updates' worth.

    Attributes:
        entries: names of the updates that it has seen; others are never activated.
        confidence: the model.
        threshold: evidence that an activation needs.
        at_most: updates active for one request.
        quality: numbers for people, all on requests that the models had not seen.
    """

    entries: tuple[str, ...]
    confidence: Confidence
    threshold: Threshold
    at_most: int
    quality: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For library.json; a threshold that nothing passes is null."""
        limit = self.threshold
        return {
            "entries": list(self.entries),
            "features": list(NAMES),
            "model": self.confidence.as_dict(),
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


class CalibrationForm(BaseModel):
    """What library.json may hold of a calibration; anybody may have written it."""

    entries: tuple[str, ...]
    model: _ModelForm
    threshold: _ThresholdForm
    at_most: int = Field(ge=1)
    quality: dict[str, Any]

    def calibration(self) -> Calibration:
        """The calibration that it says."""
        limit = self.threshold.model_dump()
        evidence = np.inf if limit["evidence"] is None else limit["evidence"]
        model = Confidence(**self.model.model_dump())
        return Calibration(self.entries, model, Threshold(**limit | {"evidence": evidence}), self.at_most, self.quality)


# -- learning --------------------------------------------------------------------------------------------------------


def learn(measured: Measured, *, rate: float, at_most: int = 1, others_count: bool = False) -> Calibration:
    """The calibration of a library.

    Args:
        measured: requests of all updates, held out from training, and unrelated ones.
        rate: of false activations that is wanted.
        at_most: updates active for one request.
        others_count: a request of an update is also taken as unrelated to all others, where the best of them does
            not help on it.

    Raises:
        DataError: fewer than two different requests.
    """
    chosen = _Pairs.of(measured)
    if len(set(chosen.groups_N)) < 2:
        raise DataError("a calibration needs at least two different requests", "add updates with held-out rows")
    fitted = cross_fit(chosen.features_NF, chosen.helped_N, chosen.groups_N)
    evidence_QE = _unseen_evidence(measured, fitted)
    strangers_M = evidence_QE[measured.origin_Q == UNRELATED].max(1)
    if others_count:
        strangers_M = np.concatenate([strangers_M, _from_others(measured, fitted)])
    limit = threshold(strangers_M, rate)
    quality = _quality(measured, chosen, fitted, evidence_QE, limit)
    return Calibration(measured.names, fit(chosen.features_NF, chosen.helped_N), limit, at_most, quality)


@dataclass(frozen=True)
class _Pairs:
    """Pairs whose outcome is known."""

    features_NF: Floats
    helped_N: Bools
    groups_N: list[int]

    @classmethod
    def of(cls, measured: Measured) -> _Pairs:
        known_QE = candidates(measured.scores_QE) & np.isfinite(measured.gain_QE)
        groups_N = np.broadcast_to(measured.group_Q[:, None], known_QE.shape)[known_QE]
        return cls(measured.features()[known_QE], measured.gain_QE[known_QE] > 0, groups_N.tolist())


def _unseen_evidence(measured: Measured, fitted: CrossFit) -> Floats:
    """[Q, E], of every request by the model that has not seen it; -inf for those that are no candidates."""
    features_QEF = measured.features()
    rows = [fitted.of(int(group)).evidence(own) for own, group in zip(features_QEF, measured.group_Q, strict=True)]
    return np.where(candidates(measured.scores_QE), np.array(rows), -np.inf)


def _from_others(measured: Measured, fitted: CrossFit) -> Floats:
    """The most evidence on requests of updates in a library without their own, where what it speaks for is no help."""
    if len(measured.names) < 2:
        return np.zeros(0)
    alone = measured.without_own()
    evidence_QE = _unseen_evidence(alone, fitted)
    gain_Q = np.take_along_axis(alone.gain_QE, evidence_QE.argmax(1)[:, None], 1)[:, 0]
    return evidence_QE.max(1)[gain_Q <= 0]


def _quality(
    measured: Measured, pairs: _Pairs, fitted: CrossFit, evidence_QE: Floats, limit: Threshold
) -> dict[str, Any]:
    """How good confidence and threshold are on requests that the models had not seen."""
    judges = [fitted.of(group) for group in pairs.groups_N]
    evidence_N = [judge.evidence(own) for own, judge in zip(pairs.features_NF, judges, strict=True)]
    confidence_N = np.array([float(j.probability(e)) for e, j in zip(evidence_N, judges, strict=True)])
    bins = reliability(confidence_N, pairs.helped_N)
    curve = activation_curve(measured, evidence_QE)
    return {
        "pairs": len(confidence_N),
        "helped": float(pairs.helped_N.mean()),
        "requests": {name: int((measured.origin_Q == at).sum()) for at, name in enumerate(measured.names)},
        "unrelated": int((measured.origin_Q == UNRELATED).sum()),
        "calibration_error": calibration_error(bins),
        "brier": brier(confidence_N, pairs.helped_N),
        "brier_of_constant": brier(np.full(len(confidence_N), pairs.helped_N.mean()), pairs.helped_N),
        "reliability": [[one.pairs, one.confidence, one.helped] for one in bins],
        "at_threshold": activation(measured, evidence_QE, limit.evidence),
        "curve": curve,
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
