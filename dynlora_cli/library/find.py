"""Finds the updates that a request may be about: the features of both, by keys and words. No adapter is run.

Dimensions: Q requests, E updates, N keys, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.library.features import Floats, Overlap
from dynlora_cli.library.keys import Keys, nearest, space_of
from dynlora_cli.library.library import Entry
from dynlora_cli.retrieval.encoders import Encoder


@dataclass(frozen=True)
class Found:
    """What was found for requests.

    Attributes:
        scores_QE: cosine with the nearest key of each update, -1 for an update without keys.
        nearest_QE: number of that key, -1 likewise.
        overlap_QE: as in features.py.
    """

    scores_QE: Floats
    nearest_QE: NDArray[np.int64]
    overlap_QE: Floats


class Finder:
    """The keys of some updates of a library.

    Other updates of the library have no influence, so what was learned with these holds while others come.

    Args:
        entries: the updates.
        encoder: that made their keys.
    """

    def __init__(self, entries: Sequence[Entry], encoder: Encoder) -> None:
        self.entries, self.encoder = list(entries), encoder
        self.keys = [Keys.of(entry, encoder.dimension) for entry in entries]
        self.space = space_of(encoder.name, self.keys)
        self.overlap = Overlap([own.texts for own in self.keys])

    def find(self, texts: Sequence[str]) -> Found:
        """Look for requests, each by its text."""
        scores_QE, nearest_QE = nearest(self.encoder.encode(texts), self.keys, self.space)
        return Found(scores_QE.astype(np.float64), nearest_QE, self.overlap.of(texts))

    def likeness(self, one: tuple[int, int], other: tuple[int, int]) -> float:
        """The cosine of two keys, each given as (update, key) by numbers."""
        first_1D, second_1D = (np.asarray(self.keys[update].vectors[key : key + 1]) for update, key in (one, other))
        return float(self.space.requests(first_1D).cosines(second_1D)[0, 0])

    def key(self, update: int, number: int) -> tuple[str, str]:
        """Text and source of a key."""
        return self.keys[update].texts[number], self.keys[update].sources[number]
