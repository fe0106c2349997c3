"""What is known of a request and an update before anything is run: score, margin and overlap.

    score      the largest cosine of the request to a key of the update, in standard deviations above what unrelated
               requests have with that update: an update of many keys is near to everything
    margin     how much that is above the best score of any other update; below 0 for all but the best
    overlap    share of the request's words, rare ones weighing more, that stand in some key text of the update

The first is what speaker verification calls Z-norm (Auckenthaler et al., Score normalization for text-independent
speaker verification systems, 2000).

Dimensions: Q requests, E updates, F features.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_SPREAD = 1e-3  # of cosines
NAMES = ("score", "margin", "overlap")
# A run of letters and digits; a Chinese character or a kana, of which no spaces make words, is one alone.
WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W぀-ヿ㐀-鿿豈-﫿]+")

Floats = NDArray[np.float64]


def words(text: str) -> set[str]:
    """The different words of a text, in lower case."""
    return set(WORD.findall(text.casefold()))


class Overlap:
    """How much of a request's words an update's key texts hold.

    A word weighs log((T + 1) / (t + 1)), of T key texts in all of which t hold it: a word of all texts weighs nothing,
    one of none the most.

    Args:
        texts: key texts of each update.
    """

    def __init__(self, texts: Sequence[Iterable[str]]) -> None:
        found = [[words(text) for text in own] for own in texts]
        self.vocabularies = [set().union(*own) for own in found]
        self.seen = Counter(word for own in found for text in own for word in text)
        self.texts = sum(map(len, found))

    def of(self, requests: Sequence[str]) -> Floats:
        """[Q, E], each from 0 to 1; 0 for a request without words."""
        shares = np.zeros((len(requests), len(self.vocabularies)))
        for row, request in enumerate(requests):
            weights = {word: math.log((self.texts + 1) / (self.seen[word] + 1)) for word in sorted(words(request))}
            total = sum(weights.values())
            for column, vocabulary in enumerate(self.vocabularies):
                held = sum(weight for word, weight in weights.items() if word in vocabulary)
                shares[row, column] = held / total if total else 0.0
        return shares


@dataclass(frozen=True)
class Background:
    """What cosines unrelated requests have with the nearest keys of each update.

    Attributes:
        mean: by update.
        spread: standard deviation, by update.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, scores_QE: Floats) -> Background:
        """Of unrelated requests; with fewer than two of them, cosines stay as they are."""
        if len(scores_QE) < 2:
            return cls((0.0,) * scores_QE.shape[1], (1.0,) * scores_QE.shape[1])
        spread_E = np.maximum(scores_QE.std(0), LEAST_SPREAD)
        return cls(tuple(map(float, scores_QE.mean(0))), tuple(map(float, spread_E)))

    def some(self, which_E: NDArray[np.bool_]) -> Background:
        """Of some of the updates."""
        mean, spread = (np.asarray(part)[which_E].tolist() for part in (self.mean, self.spread))
        return Background(tuple(mean), tuple(spread))

    def scores(self, cosines_QE: Floats) -> Floats:
        """[Q, E]: in standard deviations above the mean."""
        return (np.asarray(cosines_QE, dtype=np.float64) - np.asarray(self.mean)) / np.asarray(self.spread)


def features(scores_QE: Floats, overlap_QE: Floats) -> Floats:
    """[Q, E, F]; the margin of an only update is 0."""
    scores_QE = np.asarray(scores_QE, dtype=np.float64)
    if scores_QE.shape[1] < 2:
        margin_QE = np.zeros_like(scores_QE)
    else:
        ordered_QE = np.sort(scores_QE, axis=1)
        best_Q1, second_Q1 = ordered_QE[:, -1:], ordered_QE[:, -2:-1]
        margin_QE = scores_QE - np.where(scores_QE == best_Q1, second_Q1, best_Q1)
    return np.stack([scores_QE, margin_QE, overlap_QE], -1)
