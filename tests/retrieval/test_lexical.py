"""BM25, and how sure it is."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from dynlora_cli.errors import MachineError
from dynlora_cli.retrieval.certainty import certainty
from dynlora_cli.retrieval.lexical import Lexical

TEXTS = ["the cat sat on the mat", "a dog sat", "Cats and dogs, and a dog again", ""]


def by_formula(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 as Lucene computes it."""
    words = [[word.strip(",").lower() for word in text.split() if len(word.strip(",")) > 1] for text in TEXTS]
    mean = sum(map(len, words)) / len(words)
    found = []
    for own in words:
        score = 0.0
        for word in query.split():
            n = sum(word in each for each in words)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            f = own.count(word)
            score += idf * f / (f + k1 * (1 - b + b * len(own) / mean)) if f else 0.0
        found.append(score)
    return found


@pytest.mark.parametrize("query", ["dog", "cat dog", "sat mat"])
def test_scores_are_those_of_the_formula(query):
    np.testing.assert_allclose(Lexical(TEXTS).scores(query), by_formula(query), rtol=1e-5)


def test_the_best_come_first_and_equals_in_their_order():
    index = Lexical(TEXTS)
    assert index.top("Dog!", 2).tolist() == [1, 2]
    assert index.top("nothing of it", 3).tolist() == [0, 1, 2]
    assert index.top("", 2).tolist() == [0, 1]
    assert Lexical(["", "!"]).top("dog", 5).tolist() == [0, 1]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MachineError, match="bm25s") as raised:
        Lexical(TEXTS)
    assert raised.value.hint == 'pip install "dynlora[retrieve]"'


def test_certainty_is_calibrated_on_other_queries():
    random = np.random.default_rng(0)
    lead = random.normal(size=4000)
    scores = np.stack([10 + lead, np.full(4000, 10.0)], 1)
    truth = 1 / (1 + np.exp(-1.5 * lead - 0.5))
    right = (random.random(4000) < truth).tolist()
    found = certainty(scores, right, [f"query {number}" for number in range(4000)])
    assert np.abs(found - truth).max() < 0.06
    unknown = certainty(scores, [None if n % 2 else r for n, r in enumerate(right)], list(map(str, range(4000))))
    assert np.abs(unknown - truth).max() < 0.1


def test_few_known_queries_give_one_share_for_all():
    scores = np.ones((10, 2))
    found = certainty(scores, [True, True, False, *[None] * 7], list(map(str, range(10))))
    assert found.tolist() == [3 / 5] * 10
    alike = certainty(np.random.default_rng(0).random((100, 2)), [True] * 100, list(map(str, range(100))))
    assert alike.tolist() == [101 / 102] * 100
