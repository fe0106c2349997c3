"""From measured requests to a calibration: on made-up requests, where the truth is known."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest

from dynlora_cli.errors import DataError
from dynlora_cli.library.learn import (
    UNRELATED,
    CalibrationForm,
    Measured,
    activation,
    activation_curve,
    candidates,
    learn,
    to_measure,
)


def made_up(own: int = 60, unrelated: int = 120, *, apart: float = 0.5, seed: int = 0) -> Measured:
    """Three updates; a request scores `apart` higher with its own, which helps; everything else does harm."""
    chance = np.random.default_rng(seed)
    origin = np.concatenate([np.repeat([0, 1, 2], own), np.full(unrelated, UNRELATED)])
    belongs = origin[:, None] == np.arange(3)
    scores = 0.2 + apart * belongs + chance.normal(scale=0.1, size=belongs.shape)
    overlap = np.clip(0.3 + 0.3 * belongs + chance.normal(scale=0.1, size=belongs.shape), 0, 1)
    gain = np.where(belongs, 2.0, -1.0) + chance.normal(scale=0.3, size=belongs.shape)
    return Measured(("a", "b", "c"), origin, np.arange(len(origin)), scores, overlap, gain)


def test_candidates_are_the_best_by_score():
    assert candidates(np.array([[0.1, 0.9, 0.5, 0.5], [1, 1, 1, 1]]), 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


def test_updates_that_always_help_are_learned_without_a_warning():
    few = made_up(own=10, unrelated=0)
    twice = [np.tile(part, 2) for part in (few.scores_QE, few.overlap_QE)]
    always = Measured(tuple("abcdef"), few.origin_Q, few.group_Q, *twice, np.ones((30, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learn(always, rate=0.1, others_count=True).quality["helped"] == 1


def test_what_is_measured():
    """The three best, the own, and the three best of a library without the own; of unrelated requests nothing."""
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5]])
    wanted = to_measure(scores, np.array([0, 4, UNRELATED]))
    assert wanted.astype(int).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0]]


def test_good_features_give_the_oracles_gain_without_false_activations():
    learned = learn(made_up(), rate=0.01)
    at, quality = learned.quality["at_threshold"], learned.quality
    assert learned.threshold.promised
    assert at["utility"] > 0.95
    assert at["false"] <= 0.02
    assert quality["calibration_error"] < 0.05
    assert quality["brier"] < 0.1 * quality["brier_of_constant"]
    assert quality["pairs"] == 3 * 300
    assert quality["requests"] == {"a": 60, "b": 60, "c": 60}


def test_features_that_tell_nothing_give_confidence_of_the_base_rate():
    measured = made_up(apart=0.0)
    flat = Measured(
        *(getattr(measured, n) for n in ("names", "origin_Q", "group_Q", "scores_QE")),
        0 * measured.overlap_QE,
        measured.gain_QE,
    )
    learned = learn(flat, rate=0.01)
    assert learned.quality["brier"] == pytest.approx(learned.quality["brier_of_constant"], abs=0.01)
    assert learned.quality["calibration_error"] < 0.06
    assert learned.quality["at_threshold"]["utility"] < 0.1


def test_the_curve_runs_from_little_to_always():
    measured = made_up()
    evidence = np.where(candidates(measured.scores_QE), measured.scores_QE, -np.inf)
    curve = activation_curve(measured, evidence)
    assert curve[0]["active"] + curve[0]["false"] == 0
    assert (curve[-1]["active"], curve[-1]["false"]) == (1, 1)
    assert all(a["false"] <= b["false"] and a["active"] <= b["active"] for a, b in itertools.pairwise(curve))


def test_utility_is_the_share_of_the_oracles_gain():
    gain = np.array([[3.0, 1.0], [-1.0, -2.0], [1.0, 4.0], [9.0, 9.0]])
    scores = np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.6], [0.1, 0.05]])
    measured = Measured(("a", "b"), np.array([0, 0, 1, UNRELATED]), np.arange(4), scores, scores, gain)
    at = activation(measured, scores, 0.5)
    assert at == {"utility": (3 - 1 + 1) / (3 + 0 + 4), "false": 0.0, "active": 1.0, "right": pytest.approx(2 / 3)}


def test_requests_of_others_count_where_no_update_helps():
    """In a library without the own update nothing helps, so each such request is one more unrelated one."""
    measured = made_up(own=20, unrelated=30)
    assert learn(measured, rate=0.1).threshold.requests == 30
    assert learn(measured, rate=0.1, others_count=True).threshold.requests == 30 + 60


def test_too_few_unrelated_requests_promise_nothing():
    learned = learn(made_up(unrelated=40), rate=0.01)
    assert not learned.threshold.promised
    assert learned.quality["at_threshold"]["false"] == 0


@pytest.mark.parametrize("unrelated", [0, 50])
def test_plain_numbers_come_back(unrelated: int):
    learned = learn(made_up(unrelated=unrelated), rate=0.02, at_most=2)
    text = json.dumps(learned.as_dict(), allow_nan=False)
    assert CalibrationForm.model_validate(json.loads(text)).calibration() == learned
    assert (json.loads(text)["threshold"]["evidence"] is None) == (unrelated == 0)


def test_the_same_rows_learn_the_same():
    assert learn(made_up(), rate=0.01).as_dict() == learn(made_up(), rate=0.01).as_dict()


def test_one_request_is_too_few():
    with pytest.raises(DataError, match="at least two different requests"):
        learn(
            Measured(("a",), np.array([0]), np.array([0]), np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1))), rate=0.01
        )
