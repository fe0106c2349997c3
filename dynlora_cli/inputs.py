"""What the layers' inputs are, seen through their components: covariances of k x k, never of the layer's size.

    InputCovariances    collects E[h hᵀ] of every layer, h = A x
    turn                the components that fit these inputs, largest first
    InputEnergies       what each of them does to its layer's output

With M = B A C^½ and C = E[x xᵀ], M Mᵀ = B (A C Aᵀ) Bᵀ, and A C Aᵀ = E[h hᵀ]. So the left singular vectors u_i of M, and
with them the best components u_i (u_iᵀ B A) for these inputs, need nothing larger than that.

Dimensions: C components of a layer, K of the pool, I inputs, O outputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.components import Pool


@dataclass
class InputEnergies:
    """E(b_i · a_iᵀ x)² of every component: the mean square of what it adds to its layer's output. [K]"""

    energies_K: Tensor


class InputCovariances:
    """Sums h hᵀ over the tokens that pass through each layer.

    Attributes:
        mask: which tokens of the batch in hand are real, [B, T]; None: all.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.mask: Tensor | None = None
        self._sums = {
            name: torch.zeros(count, count, dtype=torch.float64, device=pool.values.device)
            for name, count in pool.counts.items()
        }
        self._tokens = dict.fromkeys(pool.counts, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at all inputs inside the block."""
        handles = [
            layer.register_forward_pre_hook(partial(self._look, name)) for name, layer in self.pool.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _look(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        a_CI: Tensor = layer.a_CI  # type: ignore[assignment]
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            x = x[self.mask]
        h_NC = F.linear(x.reshape(-1, x.shape[-1]).to(a_CI.dtype), a_CI).double()
        self._sums[name] += h_NC.T @ h_NC
        self._tokens[name] += len(h_NC)

    def mean(self, name: str) -> Tensor:
        """E[h hᵀ] of a layer. [C, C], fp64"""
        return self._sums[name] / max(1, self._tokens[name])


def turn(a_CI: Tensor, b_OC: Tensor, covariance_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same update as components that are best for these inputs, and the energy of each, largest first.

    Args:
        a_CI, b_OC: of the layer.
        covariance_CC: E[h hᵀ], h = A x.

    Returns:
        a_CI with rows of one length, b_OC, and the energies E(u_iᵀ B A x)². [C], at most min(C, O) of them
    """
    a, b = a_CI.double(), b_OC.double()
    q, r = torch.linalg.qr(b)
    energies, vectors = torch.linalg.eigh(r @ covariance_CC.to(r) @ r.T)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    rows = vectors.T @ r @ a  # u_iᵀ B A
    length = a.norm(dim=1).mean() / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows * length[:, None]).to(a_CI.dtype), ((q @ vectors) / length).to(b_OC.dtype), energies
