"""Which components stay: those that are worth most per number they hold, under one budget for all layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select_K(scores_K: Tensor, costs_K: Tensor, layers_K: Tensor, target: int, *, capped: bool) -> tuple[Tensor, float]:
    """Choose the components to keep: the best by one threshold over the whole pool.

    Args:
        scores_K: higher is better.
        costs_K: numbers of each component.
        layers_K: index of each component's layer.
        target: numbers that may stay.
        capped: of a layer with k components at most max(1, ceil(k/4)) go; the target may then be missed.

    Returns:
        keep_K (boolean) and the highest score that was removed (-inf if none). The best component
        always stays. Where scores are equal, layers lose their last components alike.
    """
    scores, costs, layers = scores_K.double().cpu(), costs_K.cpu(), layers_K.cpu()
    counts = layers.bincount()
    first_of_layer = counts.cumsum(0) - counts
    position = torch.arange(len(scores)) - first_of_layer[layers]
    # Stable sorts, least important key first: worst score first, ties by position from the back.
    order = position.argsort(descending=True, stable=True)
    order = order[scores[order].argsort(stable=True)]
    if capped:
        by_layer = order[layers[order].argsort(stable=True)]
        place = torch.empty_like(order)
        place[by_layer] = torch.arange(len(scores)) - first_of_layer[layers[by_layer]]
        may_go = place < ((counts + 3) // 4)[layers]
        order = order[may_go[order]]
    excess = int(costs.sum()) - target
    gone_before = costs[order].cumsum(0) - costs[order]
    removed = order[gone_before < excess]
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[removed] = False
    if not keep.any():
        keep[order[-1]] = True
    threshold = scores[~keep].max().item() if not keep.all() else -math.inf
    return keep.to(scores_K.device), threshold
