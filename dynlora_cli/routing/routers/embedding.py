"""The update whose keys are about what the request is about, by the mean of their vectors.

What it does
    Compares the vector of a request with the mean of each update's keys, by cosine, and activates the nearest. With
    `top_k` above 1 the nearest few, with equal weights that sum to 1: the mean of their outputs.

    Where the library is calibrated, its threshold decides whether any is activated at all. Where it is not, an update
    is taken only if the request lies no further from it than nearly all of its own keys do: `least` is the share of
    keys that may lie further. What that share says is how many of an update's own requests would be missed, and
    nothing about the requests of others: so it is a guess, and calibration is the cure.

When to use it
    Before a library is calibrated; and where its updates are of clearly different topics.

Reference
    Zhao et al., LoraRetriever, 2402.09997.
"""

# Dimensions: Q requests, E updates, N keys, D numbers of a vector.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import UsageError
from dynlora_cli.library.activation import Decision
from dynlora_cli.library.keys import Keys, Vectors, nearest, space_of
from dynlora_cli.library.library import Entry
from dynlora_cli.library.space import Space
from dynlora_cli.retrieval.encoders import Encoder
from dynlora_cli.routing.router import Asked, Context
from dynlora_cli.text import counted

UNIT = "request"
NEEDS = ("keys",)
OPTIONS = {
    "top_k": {"type": "int", "default": 1, "at_least": 1, "help": "Updates that speak together at most."},
    "least": {
        "type": "float",
        "default": 0.05,
        "at_least": 0,
        "below": 1,
        "help": "Without a calibration: share of an update's own keys that may lie further from it than a request.",
    },
}
FEW = 20  # keys; of fewer, a share of 0.05 is not one key
GUESS = 0.5  # cosine that an update of a single key asks for

Floats = NDArray[np.float64]


class Embedding:
    """Compares requests with the means of keys.

    Args:
        entries: updates with keys.
        encoder: that made them.
        top_k: updates that speak together at most.
        least: share of keys that may lie further than a request; None: another decides on "none of them".

    Attributes:
        limit_E: cosine that each update asks for.
    """

    def __init__(self, entries: Sequence[Entry], encoder: Encoder, top_k: int, least: float | None) -> None:
        self.names, self.encoder, self.top_k = [entry.name for entry in entries], encoder, top_k
        self.keys = [Keys.of(entry, encoder.dimension) for entry in entries]
        self.space = space_of(encoder.name, self.keys)
        self.mean_ED = np.stack([np.asarray(own.vectors, dtype=np.float32).mean(0) for own in self.keys])
        self.limit_E = np.array([-np.inf if least is None else _limit(own, self.space, least) for own in self.keys])
        self.notes = [] if least is None else self._guesses(least)

    def _guesses(self, least: float) -> list[str]:
        notes = [
            f"no calibration: an update is taken where a request lies as near to it as {1 - least:.0%} of its own keys "
            "do, which is a guess"
        ]
        few = [f"{name} ({counted(len(own.vectors), 'key')})" for name, own in zip(self.names, self.keys, strict=True)
               if len(own.vectors) < FEW]  # fmt: skip
        return notes + ([f"too few keys for a limit that means much: {', '.join(few)}"] if few else [])

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """A decision for each request."""
        if not requests:
            return []
        query_QD = self.encoder.encode([request.text for request in requests])
        cosine_QE = self.space.requests(query_QD).cosines(self.mean_ED).astype(np.float64)
        _, nearest_QE = nearest(query_QD, self.keys, self.space)
        silent = Decision((), {}, "base: there is no request to go by")
        return [
            self._decide(cosine_QE[row], nearest_QE[row]) if request.text.strip() else silent
            for row, request in enumerate(requests)
        ]

    def _decide(self, cosine_E: Floats, nearest_E: NDArray[np.int64]) -> Decision:
        order = [int(update) for update in (-cosine_E).argsort(kind="stable")]
        chosen = [update for update in order if cosine_E[update] >= self.limit_E[update]][: self.top_k]
        first = chosen[0] if chosen else order[0]
        key, limit = int(nearest_E[first]), self.limit_E[first]
        needed = f", needed: {limit:.2f}" if np.isfinite(limit) else ""
        said = f"{self.names[first]}: cosine {cosine_E[first]:.2f} with the mean of its keys{needed}"
        return Decision(
            tuple(self.names[update] for update in chosen),
            {self.names[update]: float(cosine_E[update]) for update in order},
            said if chosen else f"base: the nearest is {said}",
            (self.keys[first].texts[key], self.keys[first].sources[key]),
            weights={self.names[update]: 1 / len(chosen) for update in chosen},
        )


def make(context: Context) -> Embedding:
    """Of the updates that have keys."""
    assert context.library is not None
    assert context.encoder is not None
    entries = [entry for entry in context.library.entries if entry.name in context.names]
    with_keys = [entry for entry in entries if entry.keys]
    if not with_keys:
        raise UsageError(
            f"no update of {context.library.root} that could be chosen has keys",
            "add updates with rows or documents, as dynlora library add --help says",
        )
    least = None if context.must_choose else context.options.least
    router = Embedding(with_keys, context.encoder, context.options.top_k, least)
    for name in sorted(set(context.names) - {entry.name for entry in with_keys}):
        router.notes.append(f"{name} has no keys, so no request is found to be its own")
    return router


def _limit(own: Keys, space: Space, least: float) -> float:
    """The cosine that all but a share of an update's keys have with the mean of its other keys."""
    key_ND: Vectors = np.asarray(own.vectors, dtype=np.float32)
    count = len(key_ND)
    if count < 2:
        return GUESS
    others_ND = (key_ND.mean(0) * count - key_ND) / (count - 1) - space.mean_D
    turned_ND = space.turn(key_ND)
    norms_N = np.sqrt(
        np.maximum((turned_ND * (key_ND - space.mean_D)).sum(1), 0)
        * np.maximum((space.turn(others_ND + space.mean_D) * others_ND).sum(1), 0)
    )
    cosine_N = np.divide((turned_ND * others_ND).sum(1), norms_N, out=np.zeros_like(norms_N), where=norms_N > 0)
    return float(np.quantile(cosine_N.astype(np.float64), least))
