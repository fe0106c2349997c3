"""A learning rate from what is known before training.

    rate = AT · (rank / 16)^OF_RANK · (width / 192)^OF_WIDTH · (weight / 0.1)^OF_WEIGHTS · (steps / 200)^OF_STEPS
           · the variant's own factor · the objective's

rank: the average at the start, by parameters; with s constant, the update by r components grows like the root of r.
width: of the inputs of most layers. weight: the root mean square of the frozen weights, since it is relative to them
that a change is large or small. Fitted by scripts/bench/auto; what it misses by, and how Tinker's published rates lie
beside it: scripts/bench/NOTES.md.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

import torch

from dynlora_cli import plugins
from dynlora_cli.models.linear import dense_weight

if TYPE_CHECKING:
    from torch import nn

    from dynlora_cli.training.run import Run

AT, RANK, WIDTH, WEIGHT, STEPS = 2.7e-3, 16, 192, 0.1, 200
OF_RANK, OF_WIDTH, OF_WEIGHTS, OF_STEPS = -0.5, -0.55, 0.5, -0.2
SHORTEST = 30  # steps: below, the rate rises no further
USUAL_WEIGHT = 0.025  # of models of billions of weights
LOWEST, HIGHEST = 1e-6, 0.1
LOOKED_AT = 16  # layers, which tell as much as all of them


def prior(run: Run) -> float:
    """The rate that a run is likely to do well with; two digits, so that it can be written down."""
    layers = list(run.trained.layers.values())
    factor = plugins.declared("variants", run.recipe.adapter.variant, "RATE", 1.0)
    factor *= plugins.declared("objectives", getattr(run.recipe.train, "objective", plugins.OBJECTIVE), "RATE", 1.0)
    width, rank, weight = float(WIDTH), float(RANK), USUAL_WEIGHT
    if layers:
        width = median(layer.in_features for layer in layers)
        rank = run.trained.parameters / sum(layer.in_features + layer.out_features for layer in layers)
        if not run.recipe.train.shard_base:  # of which each process holds another part
            weight = weight_size([layer.base for layer in layers])
    elif (own := getattr(run.model.config, "hidden_size", None)) is not None:
        width = own
    return rounded(factor * rate_for(rank, width, weight, run.total_steps))


def rate_for(rank: float, width: float, weight: float, steps: int) -> float:
    """The formula, for variant lora."""
    of_model = (width / WIDTH) ** OF_WIDTH * (weight / WEIGHT) ** OF_WEIGHTS
    return AT * (rank / RANK) ** OF_RANK * of_model * (max(steps, SHORTEST) / STEPS) ** OF_STEPS


@torch.no_grad()
def weight_size(bases: list[nn.Module]) -> float:
    """The root mean square of a layer's weights, as the geometric mean over some of the layers, evenly spread."""
    some = bases[:: max(1, len(bases) // LOOKED_AT)]
    weights = map(dense_weight, some)
    sizes = [torch.linalg.vector_norm(weight).item() / math.sqrt(weight.numel()) for weight in weights]
    return math.exp(sum(math.log(max(size, 1e-4)) for size in sizes) / len(sizes))


def rounded(rate: float) -> float:
    """Two digits, within bounds that no run should leave."""
    return float(f"{min(max(rate, LOWEST), HIGHEST):.1e}")
