"""Going on from components that are there already: they come first in their layer, and new ones behind them.

    W' = W + s · (B_old A_old + B_new A_new)          B_new = 0, and the rows of A_new are orthogonal to those of A_old

So the function at the start is that of the old components, to the bit where s is a power of two, and what the new ones
read of the inputs is nothing that the old ones read.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool

SMALLEST = 1e-9  # singular values below this share of the largest are no direction of a span


@torch.no_grad()
def write_old(pool: Pool, old: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write components into the first places of their layers.

    Args:
        pool: with room for them.
        old: a_CI and b_OC of every layer that has some, with the scale in B.
    """
    for name, (a_CI, b_OC) in old.items():
        layer = pool.layers[name]
        layer.a_CI[: len(a_CI), : layer.in_features].copy_(a_CI)
        layer.b_OC[:, : len(a_CI)].copy_(b_OC / layer.scale)


@torch.no_grad()
def turn_from_old(pool: Pool, *, orthonormal: bool) -> list[str]:
    """Make the rows of every new A orthogonal to the old ones of its layer; each row keeps its norm.

    Args:
        pool: holds old components and new ones.
        orthonormal: new rows were orthogonal to each other, and are to stay so.

    Returns:
        The layers whose old rows span all inputs, so that the new ones stay as they were.
    """
    full = []
    for name, layer in pool.layers.items():
        if 0 < layer.old < layer.count:
            a_CI = layer.a_CI[:, : layer.in_features]  # without a magnitude in the last column
            new_CI = a_CI[layer.old :]
            turned = orthogonal_to(a_CI[: layer.old], new_CI, orthonormal=orthonormal)
            if turned is None:
                full.append(name)
            else:
                new_CI.copy_(turned)
    return full


def orthogonal_to(old_CI: Tensor, new_CI: Tensor, *, orthonormal: bool) -> Tensor | None:
    """The new rows without what lies in the span of the old ones, as long as they were; None where nothing is left."""
    old, new = old_CI.double(), new_CI.double()
    _, sigma, directions = torch.linalg.svd(old, full_matrices=False)
    span = directions[sigma > SMALLEST * sigma.max()]
    room = old.shape[1] - len(span)
    if room == 0:
        return None
    length_C = new.norm(dim=1, keepdim=True)
    for _ in range(2):  # what rounding left of the span goes with the second pass
        new = new - new @ span.T @ span
    if orthonormal and len(new) <= room:
        q, r = torch.linalg.qr(torch.cat([span, new]).T)
        new = (q * r.diagonal().sign()).T[len(span) :]
    return (new / new.norm(dim=1, keepdim=True) * length_C).to(new_CI.dtype)


def exact(scale: float) -> bool:
    """Whether dividing by the scale and multiplying with it again gives the same number."""
    return math.frexp(scale)[0] == 0.5
