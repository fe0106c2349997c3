"""InfLoRA: new components look only at what the earlier rows did not show, so that they stay silent on those rows.

    1  V, the span of what went into a layer on the earlier rows: so many principal directions as hold `ENERGY` of
       Σ‖x‖², around zero and not around the mean, since a component answers to the mean as well
    2  what goes in on the new rows, less its part in V: x - VᵀV x
    3  A of the new components: the principal directions of that. It stays fixed, B alone trains

What a new component adds on an earlier row is then at most the share of the row that V leaves out. The paper makes its
reduction matrix (our A) in the same way, and gives it the same length, a root of 1/3 for each row.

Source: InfLoRA, CVPR 2024 (arXiv 2404.00228), section 3.2; its DualGPM keeps V from task to task, here V is found anew
from the rows of all earlier runs.

Dimensions: C components, I inputs, N vectors of a batch, K directions of the span.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynlora_cli.lora.directions import Directions, orthonormal_rows

ENERGY = 0.95  # of the earlier inputs, as in the paper's first tasks
MOST = 256  # directions of a span at most, so that the watching stays cheap


def widest(d_in: int, count: int) -> int:
    """Directions that the span of earlier inputs may have: enough room stays for `count` new components."""
    return max(1, min(MOST, d_in // 2, d_in - count))


def span_of(earlier: Directions, most: int) -> tuple[Tensor, float]:
    """Orthonormal rows that hold ENERGY of the earlier inputs, [K, I], and the share that they do hold.

    Args:
        earlier: around zero.
        most: rows at most; then the share may be below ENERGY.
    """
    shares = torch.tensor(earlier.explained()[:most], dtype=torch.float64).cumsum(0)
    enough = int((shares < ENERGY).sum()) + 1
    rows = earlier.scaled_CI[: min(enough, most)]
    rows = rows[rows.norm(dim=1) > 0]
    held = shares[len(rows) - 1].item() if len(rows) else 1.0
    return rows / rows.norm(dim=1, keepdim=True), held


def without(x_NI: Tensor, span_KI: Tensor) -> Tensor:
    """The vectors less their part in the span. [N, I], fp32"""
    x = x_NI.float()
    return x - (x @ span_KI.T) @ span_KI


def complement_start(new: Directions, span_KI: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A of `count` new components: directions of the new inputs outside the span, each √(1/3) long. [count, I]

    Where the new inputs have too few such directions, others outside the span are drawn at random.

    Args:
        new: of the new inputs, each less its part in the span.
        span_KI: orthonormal rows.
        count: at most I - K.
        generator: on the CPU.
    """
    kept = orthonormal_rows(new.scaled_CI[:count].cpu(), count, generator)
    outside = without(kept, span_KI.cpu())
    return orthonormal_rows(outside, count, generator) / math.sqrt(3)
