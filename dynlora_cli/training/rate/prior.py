"""A learning rate from what is known before training: the size of the components, the model's width, the run's length.

    rate = AT · (rank / 16)^OF_RANK · (width / 192)^OF_WIDTH · (steps / 200)^OF_STEPS · the variant's own factor

rank is the average at the start, by parameters; width is that of most layers' inputs. With s constant, an update of r
components grows like the root of r at one rate, so the rate falls with it. Fitted by scripts/bench/auto; what it misses
by, and Tinker's published formula beside it: scripts/bench/NOTES.md.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from dynlora_cli import plugins

if TYPE_CHECKING:
    from dynlora_cli.training.run import Run

AT, RANK, WIDTH, STEPS = 1.75e-3, 16, 192, 200
OF_RANK, OF_WIDTH, OF_STEPS = -0.5, -0.5, -0.1
LOWEST, HIGHEST = 1e-6, 5e-2


def prior(run: Run) -> float:
    """The rate that a run is likely to do well with; two digits, so that it can be written down."""
    layers = run.trained.layers.values()
    factor = plugins.declared("variants", run.recipe.adapter.variant, "RATE", 1.0)
    width, rank = float(WIDTH), float(RANK)
    if layers:
        width = median(layer.in_features for layer in layers)
        rank = run.trained.parameters / sum(layer.in_features + layer.out_features for layer in layers)
    elif (own := getattr(run.model.config, "hidden_size", None)) is not None:
        width = own
    return rounded(factor * rate_for(rank, width, run.total_steps))


def rate_for(rank: float, width: float, steps: int) -> float:
    """The formula, for variant lora."""
    return AT * (rank / RANK) ** OF_RANK * (width / WIDTH) ** OF_WIDTH * (steps / STEPS) ** OF_STEPS


def rounded(rate: float) -> float:
    """Two digits, within bounds that no run should leave."""
    return float(f"{min(max(rate, LOWEST), HIGHEST):.1e}")
