"""T-LoRA: of a LoRA's components the first ones are used, as many as the timestep allows.

    W'(t) = W + Σ b_i a_iᵀ over the first r(t)          lora/timesteps/schedule.py

It is kept in the files of a LoRA, with the rule in the metadata of the tensors' file.

Source: T-LoRA, arXiv 2507.05964, equation 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.adapters.images.by_timestep import no_single_weight
from dynlora_cli.adapters.kind import Files, Own, Read
from dynlora_cli.lora.timesteps.clock import Clock
from dynlora_cli.lora.timesteps.layer import TimedLinear
from dynlora_cli.lora.timesteps.schedule import Schedule

title = "T-LoRA"
tensors = ("lora_A", "lora_B")


def written(config: dict[str, Any], tensors: dict[str, Tensor], _own: Own) -> Files:
    """A LoRA's files; their writer puts the schedule beside them."""
    return config, tensors


def layer(base: nn.Module, factors: Factors, _weight: Read, _bias: Read) -> TimedLinear:
    """The layer with its components; whoever puts it on a model gives all layers one clock."""
    return TimedLinear(base, factors.scale, clock=Clock(factors.schedule or Schedule()))


def fold(_W_OI: Tensor, _factors: Factors) -> None:
    """There is no W'.

    Raises:
        UsageError: always.
    """
    raise no_single_weight()
