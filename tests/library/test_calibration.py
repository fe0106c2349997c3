"""The mathematics of retrieval confidence: curves, errors and thresholds against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from dynlora_cli.library.calibration import (
    Confidence,
    brier,
    calibration_error,
    fit,
    folds_of,
    isotonic,
    logistic,
    platt,
    reliability,
    sigmoid,
    threshold,
)


def drawn(pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, the first of which decides with noise, and outcomes."""
    chance = np.random.default_rng(seed)
    features = chance.normal(size=(pairs, 3))
    return features, chance.random(pairs) < sigmoid(3 * features[:, 0] - 1)


def test_adjacent_violators_are_pooled():
    """By hand: 0 1 | 1 0 0 | 1 becomes 0, then the mean of 1 1 0 0, then 1."""
    evidence, helped = np.arange(6.0), np.array([False, True, True, False, False, True])
    curve = Confidence((1.0,), 0.0, curve=isotonic(evidence, helped))
    assert curve.probability(evidence) == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 1])


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_curve_equals_scikit_learn(seed: int):
    chance = np.random.default_rng(seed)
    evidence = np.round(chance.normal(size=300), 1)  # with ties
    helped = chance.random(300) < sigmoid(evidence)
    sklearn = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(evidence, helped)
    at = np.linspace(-5, 5, 1001)
    kept = Confidence((1.0,), 0.0, curve=isotonic(evidence, helped))
    assert kept.probability(at) == pytest.approx(sklearn.predict(at), abs=1e-12)


def test_platts_curve_is_the_logistic_regression_on_softened_outcomes():
    evidence, helped = drawn(150)[0][:, 0], drawn(150)[1]
    n, k = len(helped), int(helped.sum())
    high, low = (k + 1) / (k + 2), 1 / (n - k + 2)
    wanted = np.where(helped, high, low)
    both = np.concatenate([evidence, evidence])[:, None]
    weights = np.concatenate([wanted, 1 - wanted])
    model = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(both, [1] * n + [0] * n, weights)
    assert platt(evidence, helped) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), rel=1e-4)


@pytest.mark.parametrize(("pairs", "curved"), [(199, False), (200, True)])
def test_the_curve_is_isotonic_from_200_pairs_on(pairs: int, curved: bool):
    model = fit(*drawn(pairs))
    assert (model.curve is not None) == curved
    probability = model.probability(np.linspace(-9, 9, 100))
    assert (np.diff(probability) >= 0).all()
    assert 0 <= probability[0] < 0.3 < 0.7 < probability[-1] <= 1


def test_deciding_needs_the_plain_numbers_only():
    features, helped = drawn(400)
    model = fit(features, helped)
    stored = model.as_dict()
    again = Confidence(tuple(stored["weights"]), stored["intercept"], tuple(map(tuple, stored["curve"])))
    assert (again.probability(again.evidence(features)) == model.probability(model.evidence(features))).all()


def test_no_feature_speaks_against_an_update():
    features, helped = drawn(500)
    turned = features * [1, -1, 1]
    turned[:, 1] -= 2 * features[:, 0]  # falls where updates help
    model = fit(turned, helped)
    assert model.weights[1] == 0
    assert min(model.weights) == 0 < model.weights[0]
    assert model.weights[0] == pytest.approx(logistic(np.delete(turned, 1, 1), helped).weights[0])
    nothing = fit(-np.abs(features[:, :1]) * helped[:, None], helped)
    assert nothing.weights == (0.0,)
    assert nothing.intercept == pytest.approx(math.log(helped.mean() / (1 - helped.mean())))


@pytest.mark.parametrize(("always", "expected"), [(True, 31 / 32), (False, 1 / 32)])
def test_outcomes_that_are_all_alike_give_one_confidence(always: bool, expected: float):
    features = np.random.default_rng(0).normal(size=(30, 3))
    model = fit(features, np.full(30, always))
    assert model.probability(model.evidence(features)) == pytest.approx(np.full(30, expected))
    assert (model.evidence(features) == features[:, 0]).all()


def test_bins_error_and_brier_by_hand():
    confidence = np.array([0.1, 0.1, 0.9, 0.9])
    helped = np.array([False, True, True, True])
    bins = reliability(confidence, helped, bins=2)
    assert [(one.pairs, one.confidence, one.helped) for one in bins] == [(2, 0.1, 0.5), (2, 0.9, 1.0)]
    assert calibration_error(bins) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert brier(confidence, helped) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)


def test_equal_confidences_share_a_bin():
    """Or their order would decide, and an honest constant would seem wrong."""
    (only,) = reliability(np.full(100, 0.5), np.arange(100) < 50)
    assert (only.pairs, only.confidence, only.helped) == (100, 0.5, 0.5)


def test_perfect_and_hopeless_scores():
    helped = np.arange(100) % 2 == 0
    perfect, hopeless = helped.astype(float), 1 - helped.astype(float)
    assert brier(perfect, helped) == calibration_error(reliability(perfect, helped)) == 0
    assert brier(hopeless, helped) == calibration_error(reliability(hopeless, helped)) == 1
    assert brier(np.full(100, 0.5), helped) == 0.25
    assert calibration_error(reliability(np.full(100, 0.5), helped)) == 0


def test_requests_with_one_prompt_are_in_one_fold():
    groups = np.random.default_rng(0).integers(0, 40, 300)
    fold = folds_of(groups.tolist())
    assert all(len(set(fold[groups == group])) == 1 for group in range(40))
    assert sorted(np.bincount([fold[groups == group][0] for group in range(40)])) == [8] * 5
    assert (folds_of(groups.tolist()) == fold).all()
    assert set(folds_of([7, 7, 9])) == {0, 1}
    with pytest.raises(ValueError, match="fewer than two different requests"):
        folds_of([7, 7])


def test_confidence_is_calibrated_on_requests_that_it_has_not_seen():
    features, helped = drawn(2000)
    model = fit(features[:1000], helped[:1000])
    confidence = model.probability(model.evidence(features[1000:]))
    assert calibration_error(reliability(confidence, helped[1000:])) < 0.05
    assert brier(confidence, helped[1000:]) < 0.6 * brier(np.full(1000, helped.mean()), helped[1000:])


@pytest.mark.parametrize(
    ("count", "rate", "place", "promised"),
    [(99, 0.01, 98, True), (98, 0.01, 97, False), (199, 0.01, 197, True), (9, 0.1, 8, True)],
)
def test_the_threshold_is_the_conformal_quantile(count: int, rate: float, place: int, promised: bool):
    strongest = np.random.default_rng(0).permutation(count).astype(float)
    found = threshold(strongest, rate)
    assert (found.evidence, found.promised, found.requests) == (place, promised, count)


def test_no_unrelated_request_allows_no_activation():
    assert threshold(np.array([]), 0.01).evidence == math.inf


def test_the_promised_rate_holds_for_new_requests():
    chance = np.random.default_rng(1)
    passed = [(chance.normal(size=1000) > threshold(chance.normal(size=150), 0.05).evidence).mean() for _ in range(300)]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.004)
    assert np.mean(passed) <= 0.05
