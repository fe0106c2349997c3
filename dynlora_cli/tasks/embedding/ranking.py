"""How well vectors rank: the right passages of every query among all passages.

Dimensions: Q queries, M passages, D numbers of a vector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CUTS = (1, 5, 10)  # of recall
AMONG = 10  # ranks that nDCG looks at
CHUNK = 1024  # queries compared at a time

Floats = NDArray[np.float32]


def ranking(query_QD: Floats, passage_MD: Floats, right: list[set[int]]) -> dict[str, float]:
    """Recall at 1, 5 and 10, the mean reciprocal rank and nDCG at 10, each the mean over queries; from 0 to 1.

    Recall at k is the share of a query's right passages among the first k; the rank is that of the first right one. A
    wrong passage that is just as near as a right one stands before it.

    Args:
        query_QD, passage_MD: rows of length 1.
        right: of every query, the numbers of its right passages, at least one.
    """
    sums = dict.fromkeys([*(f"recall@{cut}" for cut in CUTS), "mrr", f"ndcg@{AMONG}"], 0.0)
    gains = 1 / np.log2(np.arange(2, AMONG + 2))
    for start in range(0, len(query_QD), CHUNK):
        scores_QM = query_QD[start : start + CHUNK] @ passage_MD.T
        for query, scores_M in enumerate(scores_QM, start):
            own = sorted(right[query])
            wrong_M = np.delete(scores_M, own)
            # Right passages in the order of their scores: each stands behind all wrong ones as near, and the others.
            places = [number + int((wrong_M >= score).sum()) for number, score in enumerate(-np.sort(-scores_M[own]))]
            for cut in CUTS:
                sums[f"recall@{cut}"] += sum(place < cut for place in places) / len(own)
            sums["mrr"] += 1 / (1 + places[0])
            found = sum(gains[place] for place in places if place < AMONG)
            sums[f"ndcg@{AMONG}"] += found / gains[: len(own)].sum()
    return {name: float(total / len(query_QD)) for name, total in sums.items()}


def correlation(first: Floats, second: Floats) -> float:
    """Spearman's, of two lists of numbers: Pearson's of their ranks, of which equal numbers share the mean; 0 where one
    of them is constant."""
    ranks = [_ranks(each) for each in (first, second)]
    spreads = [float(np.std(each)) for each in ranks]
    if min(spreads) == 0:
        return 0.0
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spreads[0] * spreads[1]))


def _ranks(numbers: Floats) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
