"""Score, margin and overlap of requests with updates, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynlora_cli.library.features import Background, Overlap, features, words


def test_words_are_letters_and_digits_in_lower_case():
    assert words("Who won Super-Bowl LIX, in 2025?") == {"who", "won", "super", "bowl", "lix", "in", "2025"}
    assert words("東京の weather") == {"東", "京", "の", "weather"}


def test_margin_is_to_the_best_of_the_others():
    made = features(np.array([[0.9, 0.5, 0.6], [0.4, 0.4, 0.1]]), np.zeros((2, 3)))
    assert made[..., 1] == pytest.approx(np.array([[0.3, -0.4, -0.3], [0.0, 0.0, -0.3]]))
    assert features(np.array([[0.7]]), np.zeros((1, 1)))[0, 0].tolist() == [0.7, 0, 0]


def test_overlap_weighs_rare_words_more():
    overlap = Overlap([["the eagles won", "the chiefs lost"], ["the virus spread"]])
    (row,) = overlap.of(["the eagles virus"])
    weights = {"the": math.log(4 / 4), "eagles": math.log(4 / 2), "virus": math.log(4 / 2)}
    assert row == pytest.approx([weights["eagles"] / sum(weights.values())] * 2)
    assert overlap.of(["the unheard eagles"])[0] == pytest.approx([math.log(2) / (math.log(2) + math.log(4)), 0])
    assert overlap.of(["", "the", "..."]).tolist() == [[0, 0]] * 3


def test_scores_are_in_standard_deviations_above_what_unrelated_requests_have():
    background = Background.of(np.array([[0.2, 0.5], [0.4, 0.5]]))
    assert background.mean == pytest.approx((0.3, 0.5))
    assert background.spread == pytest.approx((0.1, 0.001)), "a spread of 0 would make every request stand out"
    assert background.scores(np.array([[0.5, 0.5]])) == pytest.approx(np.array([[2, 0]]))
    assert Background.of(np.zeros((1, 2))) == Background((0.0, 0.0), (1.0, 1.0))
    assert background.some(np.array([False, True])) == Background((0.5,), (0.001,))
