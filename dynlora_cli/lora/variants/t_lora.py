"""T-LoRA: rank by timestep, for denoisers. Where there is much noise, a layer uses its first few components alone.

What it does
    ΔW(t) = s·Σ b_i a_iᵀ over the first r(t) components, r(t) = floor(((T - t)/T)^power (r_max - min_rank)) + min_rank.
    r_max is the number that the layer has, so pruning, which cuts each layer from its end, keeps the rule. Every row of
    a batch has the rank of its own timestep. `start: orthogonal` begins with orthonormal factors that count from where
    they started (Ortho-LoRA); a component is then saved as two products.

When to use it
    For `model.task: text-to-image` with one or a few pictures, where a LoRA learns them by heart at high noise. A LoRA
    of the same mean rank, early stopping and prior preservation are what it has to beat: docs/howto/images.md.

Reference
    T-LoRA, arXiv 2507.05964, equation 3, where power is called alpha. A starts as in lora, where the paper draws
    N(0, 1/r); s is constant, where the paper has 1. The authors' code takes the timestep of the first row for all.
    Saved as a plain LoRA with the rule in its metadata; whoever does not know it computes with all components.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.timesteps.clock import Clock, follow
from dynlora_cli.lora.timesteps.layer import TimedLinear
from dynlora_cli.lora.timesteps.orthogonal import OrthogonalLinear
from dynlora_cli.lora.timesteps.schedule import Schedule
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio")
saved_as = "t-lora"
GOES_BY = "timestep"
CONFLICTS = [
    {
        "with": "model.task",
        "is_not": "text-to-image",
        "at": "adapter.variant",
        "why": "its rank goes by the timestep of a denoiser, and models of texts have none",
        "hint": "write `variant: dylora` for components in order",
    },
    {"with": "train.compile", "why": "the components in use change in each pass", "hint": "set compile to false"},
    {"with": "train.cuda_graphs", "why": "the components in use change in each pass", "hint": "set it to false"},
    {
        "with": "pruning.policy",
        "is": "retrieval",
        "why": "gradients of single rows follow from inputs and outputs where all rows use all components",
        "hint": "write `policy: gradient`",
    },
]
OPTIONS = {
    "schedule": {
        "type": "choice",
        "choices": ["falling", "rising", "random"],
        "default": "falling",
        "help": "Components that are used: fewer with more noise; to compare with, the reverse, or drawn for each row.",
    },
    "power": {"type": "float", "default": 1.0, "above": 0, "help": "Exponent of the share of noise that is gone."},
    "min_rank": {"type": "int", "default": 1, "at_least": 0, "help": "Components that every timestep uses."},
    "start": {
        "type": "choice",
        "choices": ["vanilla", "orthogonal"],
        "default": "vanilla",
        "help": "vanilla: as a LoRA; orthogonal: orthonormal factors that count from where they started.",
    },
}


class Layer(TimedLinear):
    """The layer of `start: vanilla`."""

    @classmethod
    def of(cls, options: Adapter) -> type[ComponentLinear]:
        return OrthogonalLinear if _counts_from_start(options) else cls


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it; the model's timestep decides in each pass.

    Raises:
        UsageError: the model is told no timestep.
    """
    kind = OrthogonalLinear if _counts_from_start(options) else Layer
    given = {key: getattr(options, key) for key in ("power", "min_rank")}
    timesteps = float(getattr(model, "noise_timestep", 1000))
    clock = Clock(Schedule(timesteps, **given, shape=options.schedule, terms=kind.terms, seed=seed))  # type: ignore[attr-defined]
    follow(model, clock)
    return put(model, targets, start, options, seed, partial(kind, clock=clock))


def _counts_from_start(options: Adapter) -> bool:
    return getattr(options, "start", "") == "orthogonal"
