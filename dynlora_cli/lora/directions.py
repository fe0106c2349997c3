"""Directions to start from: principal ones of a matrix or of a stream of vectors, and random orthonormal ones.

Dimensions: C components, I inputs, O outputs, M rows, N vectors of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLED, ITERATIONS = 16, 8  # of the randomized SVD
SMALLEST = 1e-6  # of the sum of the singular values: smaller ones are rounding


def leading(matrix_MI: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets U [M, C], S [C], V [I, C], by a randomized SVD with a fixed seed.

    Exact where the smaller side of the matrix is at most `count` + OVERSAMPLED.

    Source: Halko et al. 2011 (arXiv 0909.4061).
    """
    wanted = min(count + OVERSAMPLED, *matrix_MI.shape)
    device = matrix_MI.device
    # Under autocast its products would be bf16: small directions would get lost, and CUDA has no QR of bf16.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix_MI, q=wanted, niter=ITERATIONS)
    return u[:, :count], s[:count], v[:, :count]


def principal_factors(weight_OI: Tensor, count: int, scale: float) -> tuple[Tensor, Tensor]:
    """a_CI and b_OC whose s·BA is the best approximation of a matrix of this rank; each has the root of S as its scale.

    Source: PiSSA (arXiv 2404.02948), equations 2 and 3, divided by s as in PEFT.
    """
    u, s, v = leading(weight_OI, count)
    root_C = (s / scale).sqrt()
    return (v * root_C).T, u * root_C


def orthonormal_rows(rows_CI: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The rows, made orthonormal in their order; those that are missing or nearly zero are drawn at random. [count, I]

    Args:
        rows_CI: at most `count`, at most as many as they are long.
        generator: on the CPU, so that the draw is the same on every device.
    """
    drawn = torch.randn(count, rows_CI.shape[1], generator=generator).to(rows_CI)
    length_C = rows_CI.norm(dim=1)
    seen = rows_CI[length_C > SMALLEST * length_C.sum()]
    seen = seen / seen.norm(dim=1, keepdim=True)
    q, r = torch.linalg.qr(torch.cat([seen, drawn[len(seen) :]]).T)
    return (q * r.diagonal().sign()).T


def orthogonal_start(count: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows of the length that the rows of the default start have on average. [count, d_in]"""
    return orthonormal_rows(torch.empty(0, d_in), count, generator) / math.sqrt(3)


class Directions:
    """Principal directions of vectors that come in batches, kept as `count` rows.

    Source: Ross et al. 2008, Incremental learning for robust visual tracking, section 2.1, as in EVA (arXiv
    2410.07170) and PEFT.

    Args:
        count: of the directions.
        centered: they are those around the mean of the vectors; False: around 0, so that the mean counts as well.

    Attributes:
        scaled_CI: the directions, each as long as its singular value, largest first.
    """

    def __init__(self, count: int, *, centered: bool = True) -> None:
        self.count, self.vectors, self.centered = count, 0, centered
        self.total = 0.0  # sum of squared distances from the mean, or from 0
        self.mean_I = self.scaled_CI = torch.empty(0)

    def add(self, x_NI: Tensor) -> None:
        """Take one batch into account."""
        if len(x_NI) == 0:
            return
        x, before, new = x_NI.float(), self.vectors, len(x_NI)
        mean_I = x.mean(0) if self.centered else x.new_zeros(x.shape[1])
        rows = x - mean_I
        if before and self.centered:
            shift = math.sqrt(before * new / (before + new)) * (self.mean_I - mean_I)
            rows = torch.cat([rows, shift[None]])
            mean_I = self.mean_I.lerp(mean_I, new / (before + new))
        self.total += rows.square().sum().item()
        if before:
            rows = torch.cat([self.scaled_CI, rows])
        _, s, v = leading(rows, self.count)
        self.scaled_CI, self.mean_I, self.vectors = (v * s).T, mean_I, before + new

    def explained(self) -> list[float]:
        """The share of the variance that each direction explains, largest first; `count` of them."""
        squares = self.scaled_CI.double().square().sum(-1).tolist()
        shares = [square / self.total if self.total else 0.0 for square in squares]
        return shares + [0.0] * (self.count - len(shares))
