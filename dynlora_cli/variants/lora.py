"""LoRA as a sum of rank-1 components.

What it does
    Adds s·Σ b_i a_iᵀ to every target layer, with B = 0 at the start. `rank.init` above the budget: the components are
    pruned while training. `rank.init` equal to the budget: plain LoRA, or rsLoRA with scaling `rslora` and alpha 16.

When to use it
    The default.

Reference
    LoRA, arXiv 2106.09685: s = alpha/r; rsLoRA, arXiv 2312.03732: s = alpha/√r. Here r is the budget's average rank,
    constant for the run, so that removing one component never rescales the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from dynlora_cli.components import ComponentLinear, Pool
from dynlora_cli.rank import Start

if TYPE_CHECKING:
    from dynlora_cli.recipe import Recipe
    from dynlora_cli.recipe_settings import Adapter

has_components = True


DEFAULT_SCALE = 2.0  # measured at ranks 1 and 4: scripts/bench/NOTES.md


def scale_of(options: Adapter, rank: float) -> float:
    """s, from the recipe's `scaling` and `alpha`."""
    if options.alpha == "auto":
        return DEFAULT_SCALE
    return options.alpha / (math.sqrt(rank) if options.scaling == "rslora" else rank)


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, recipe: Recipe) -> Pool:
    """Replace every target by a `ComponentLinear` that holds it."""
    options, scale = recipe.adapter, scale_of(recipe.adapter, start.average_rank)
    layers = {}
    for name, base in targets.items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = ComponentLinear(base, scale, options.dropout)
        setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, start.counts, seed=recipe.seed, device=next(model.parameters()).device)
    pool.cast_with(model)
    return pool
