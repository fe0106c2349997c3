"""Where vectors are compared: as they are, or with what all texts share evened out.

The hidden states of a language model fill a narrow cone: every cosine is near 1, and a few directions decide all. For
such vectors the mean of the keys is subtracted and their covariance evened out ("whitening", as in Su et al. 2021,
arXiv:2103.15316), with a ridge as large as the mean variance, since there are often fewer keys than dimensions:

    A = (cov + ridge I)^-1 · ridge          cosine(q, k) = (q-m)ᵀ A (k-m) / (‖q-m‖_A ‖k-m‖_A)

A is the identity but in the directions that the keys vary in, so it is kept as these alone.

Dimensions: N keys, D numbers of a vector, Q requests, R directions in which the keys vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE = 1.0  # times the mean variance
SAMPLE = 2048  # keys that the covariance is estimated from

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Space:
    """The inner product xᵀ A y around a mean.

    Attributes:
        mean_D: is subtracted from every vector.
        axes_RD: orthonormal rows.
        gains_R: the eigenvalues of A - I along them.
    """

    mean_D: Vectors
    axes_RD: Vectors
    gains_R: Vectors

    @classmethod
    def plain(cls, dimension: int) -> Space:
        """Vectors as they are, of an encoder that was trained to be compared by cosine."""
        none = np.zeros((0, dimension), dtype=np.float32)
        return cls(np.zeros(dimension, dtype=np.float32), none, np.zeros(0, dtype=np.float32))

    @classmethod
    def of(cls, vectors: Sequence[Vectors]) -> Space:
        """The space in which the keys of some updates are evened out; every update counts alike.

        Args:
            vectors: [N, D] of each update, with one key at least among them.
        """
        share = max(1, SAMPLE // len(vectors))
        kept = [np.asarray(each[:: -(-len(each) // share)], dtype=np.float64) for each in vectors if len(each)]
        mean_D = np.mean([each.mean(axis=0) for each in kept], axis=0)
        weighted = np.concatenate([(each - mean_D) / np.sqrt(len(each) * len(kept)) for each in kept])
        _, values, axes_RD = np.linalg.svd(weighted, full_matrices=False)
        variance_R = values**2
        ridge = RIDGE * variance_R.sum() / mean_D.size
        gains_R = ridge / (variance_R + ridge) - 1 if ridge > 0 else np.zeros_like(variance_R)
        return cls(*(part.astype(np.float32) for part in (mean_D, axes_RD, gains_R)))

    def requests(self, query_QD: Vectors) -> Requests:
        """Requests, ready to be compared with any number of keys."""
        turned_QD = self.turn(query_QD)
        return Requests(self, turned_QD, _norms(query_QD - self.mean_D, turned_QD))

    def turn(self, vector_ND: Vectors) -> Vectors:
        """[N, D]: A (x - m)."""
        centred_ND = vector_ND - self.mean_D
        return centred_ND + (centred_ND @ self.axes_RD.T * self.gains_R) @ self.axes_RD


@dataclass(frozen=True)
class Requests:
    """Requests in a space.

    Attributes:
        space: they are in.
        turned_QD: A (q - m).
        norm_Q: ‖q - m‖_A.
    """

    space: Space
    turned_QD: Vectors
    norm_Q: Vectors

    def cosines(self, key_ND: Vectors) -> Vectors:
        """[Q, N]; 0 where one of the two is of length 0."""
        centred_ND = key_ND - self.space.mean_D
        norm_N = _norms(centred_ND, self.space.turn(key_ND))
        product_QN = self.turned_QD @ centred_ND.T
        norms_QN = self.norm_Q[:, None] * norm_N
        return np.divide(product_QN, norms_QN, out=np.zeros_like(product_QN), where=norms_QN > 0)


def _norms(centred_ND: Vectors, turned_ND: Vectors) -> Vectors:
    """[N]: the square root of xᵀ A x."""
    return np.sqrt(np.maximum((centred_ND * turned_ND).sum(axis=1), 0))
