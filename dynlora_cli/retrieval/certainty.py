"""How sure a retriever can be that the first passage it found is the right one: a calibrated probability.

A logistic regression (Platt scaling) on two numbers of a query, the best passage's score and its lead over the second,
learns it on queries whose right passage is known. Each query is judged by a model that was fitted without it (five
folds), so that it says what the retriever's scores are worth for a query that nobody knows the answer to.

Dimensions: Q queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import MachineError
from dynlora_cli.retrieval.lexical import INSTALL

FOLDS = 5
FEWEST = 40  # known queries, below which the scores are not looked at

Numbers = NDArray[np.float64]


def certainty(scores_Q2: Numbers, first_is_right_Q: Sequence[bool | None], queries: Sequence[str]) -> Numbers:
    """P(the first passage is the right one) of each query. [Q]

    Where there are too few known queries, or all of them came out alike, it is the same for all: the share of those
    that were found, with one more success and one more failure (Laplace).

    Args:
        scores_Q2: of the best passage and of the second best.
        first_is_right_Q: whether it is; None: nobody knows.
        queries: their texts; equal ones fall into one fold.

    Raises:
        MachineError: scikit-learn is not installed.
    """
    known = np.array([right is not None for right in first_is_right_Q])
    right = np.array([bool(right) for right in first_is_right_Q])
    share = (right[known].sum() + 1) / (known.sum() + 2)
    found = np.full(len(queries), share)
    if known.sum() < FEWEST:
        return found
    features = np.stack([scores_Q2[:, 0], scores_Q2[:, 0] - scores_Q2[:, 1]], 1)
    spread = features[known].std(0)
    features = (features - features[known].mean(0)) / np.where(spread > 0, spread, 1.0)
    fold = np.array([hashlib.sha256(query.encode("utf-8", "surrogatepass")).digest()[0] % FOLDS for query in queries])
    for number in range(FOLDS):
        others, own = known & (fold != number), fold == number
        if len(np.unique(right[others])) == 2 and own.any():
            found[own] = _fitted(features[others], right[others], features[own])
    return found


def _fitted(features: Numbers, right: NDArray[np.bool_], asked: Numbers) -> Numbers:
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise  # it is there, and broken
        raise MachineError("the confidence of a retriever needs the package scikit-learn", INSTALL) from None
    model = LogisticRegression().fit(features, right)
    return np.asarray(model.predict_proba(asked)[:, 1], dtype=np.float64)
