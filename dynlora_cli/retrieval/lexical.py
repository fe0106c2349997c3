"""Texts found by the words that they share with a query: BM25.

Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, in the form of Lucene; computed by bm25s (Lù
2024, arXiv 2407.03618). Words are runs of two or more letters or digits, in small letters. No list of stop
words: rare words weigh more anyway, and so it is the same for all languages that put spaces between words.

Dimensions: N texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import MachineError

INSTALL = 'pip install "dynlora[retrieve]"'
_WORD = re.compile(r"(?u)\b\w\w+\b")


class Lexical:
    """An index over texts.

    Args:
        texts: at least one.

    Raises:
        MachineError: the package bm25s is not installed.
    """

    name = "bm25"

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            if error.name != "bm25s":
                raise  # it is there, and broken
            raise MachineError("BM25 needs the package bm25s, which is not installed", INSTALL) from None
        self.count = len(texts)
        words = [words_of(text) for text in texts]
        self._index = bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """How well each text fits a query; 0 where they share no word. [N]"""
        words = words_of(query)
        if self._index is None or not words:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self._index.get_scores(words), dtype=np.float32)

    def top(self, query: str, k: int) -> NDArray[np.int64]:
        """The numbers of the k texts that fit best, the best first; of equals the earlier one. [k]"""
        return best(self.scores(query), k)


def words_of(text: str) -> list[str]:
    """The words of a text as the index takes them."""
    return _WORD.findall(text.lower())


def best(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Where the k highest scores are, the highest first; of equals the earlier one. [k]"""
    return np.argsort(-scores_N, kind="stable")[:k].astype(np.int64)
