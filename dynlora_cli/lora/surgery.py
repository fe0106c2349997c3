"""Removing components from a pool, its modules and its optimizer at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora_cli.lora.moments import read_moments, write_moments
from dynlora_cli.lora.pool import Pool


def shrink(pool: Pool, optimizer: torch.optim.Optimizer, keep_K: Tensor) -> None:
    """Remove components for good: from the layers, the gradients, the parameter group and the optimizer's moments.

    New tensors are made and swapped in together. (Shrinking `.data` breaks a later backward; replacing only the
    module's parameter leaves the optimizer training the old one; a zeroed component comes back through momentum.)

    Raises:
        DynloraError: an autograd graph through the old tensors is alive.
    """
    pool.refuse_live_graphs()
    old = pool.values
    keep_P = pool.numbers_P(keep_K)
    per_layer = keep_K.cpu().split(list(pool.counts.values()))
    counts = dict(zip(pool.counts, (int(keep_C.sum()) for keep_C in per_layer), strict=True))
    moments = {key: value[keep_P] for key, value in read_moments(optimizer, old).items()}
    left = [layer.survivors_C[keep] for layer, keep in zip(pool.layers.values(), per_layer, strict=True)]
    swap(pool, optimizer, old.detach()[keep_P], counts, moments)
    pool.survive(left)


def swap(
    pool: Pool,
    optimizer: torch.optim.Optimizer,
    values_P: Tensor,
    counts: Mapping[str, int],
    moments_P: Mapping[str, Tensor],
) -> None:
    """Replace the numbers of the pool, in the layers, the parameter group and the optimizer's moments at once.

    Raises:
        DynloraError: an autograd graph through the old tensors is alive.
    """
    old = pool.values
    pool.adopt(values_P, counts)
    write_moments(optimizer, pool.values, moments_P, replaces=old)
    for group in optimizer.param_groups:
        group["params"] = [pool.values if parameter is old else parameter for parameter in group["params"]]
