"""O-LoRA: what is learned now should look at the inputs in other directions than what was learned before.

The paper adds λ·Σ over layers of Σ_ij |⟨a_i, a_j⟩| to the loss, i over the old components and j over the new ones, with
the rows of A as they are; λ is 0.5 in its scripts. A product of two rows grows with their lengths, so the same λ means
another thing in another width, or after another start. Here both rows have unit length: each pair adds |cos| of the
angle between its rows, from 0 to 1, whatever the width. As in the paper, where old rows are frozen, it moves the new
rows alone: old ones that train on are not turned out of their way.

Source: O-LoRA, EMNLP Findings 2023 (arXiv 2310.14152), equation 8.

Dimensions: C components of a layer, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12  # a shorter row has no direction


def overlap(a_CI: Tensor, old: int) -> Tensor:
    """Σ |cos| of the angles between every old row and every new one. A scalar, at most old · new.

    Args:
        a_CI: one layer's A, the old components first.
        old: how many are old.
    """
    unit_CI = a_CI / a_CI.norm(dim=1, keepdim=True).clamp_min(SMALLEST)
    return (unit_CI[:old].detach() @ unit_CI[old:].T).abs().sum()


def overlap_penalty(layers: list[tuple[Tensor, int]], weight: float) -> Tensor | None:
    """`weight` times the overlap of all layers; None where no layer has both old and new components.

    Args:
        layers: A of each [C, I], and how many of its first rows are old.
        weight: λ, `adapter.orthogonality`.
    """
    parts = [overlap(a_CI, old) for a_CI, old in layers if 0 < old < len(a_CI)]
    return weight * torch.stack(parts).sum() if parts else None
