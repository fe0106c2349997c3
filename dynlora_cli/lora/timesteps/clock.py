"""Tells layers which timesteps the pass in hand is at, as the denoiser itself is told them.

Dimensions: B rows of a batch, C components of a layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.timesteps.schedule import Schedule

ARGUMENT = "timestep"  # what all of diffusers' denoisers call it


class Clock:
    """The timesteps of a pass, and how many components each row of it uses.

    Args:
        schedule: says how many.

    Attributes:
        step: of training, for what is drawn.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.step = schedule, 0
        self.shares_B: Tensor | None = None
        self._open: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def set(self, timesteps: Tensor | float, step: int = 0) -> None:
        """Begin a pass at these timesteps, one for all rows or one for each."""
        self.shares_B = self.schedule.shares_B(torch.as_tensor(timesteps).reshape(-1), step)
        self._open.clear()

    def open_BC(self, rank: int, like: Tensor) -> Tensor | None:
        """1 at the components that a row uses, else 0; None where no pass has begun. [B or 1, C]

        Args:
            rank: products in the layer's factors.
            like: of the wanted type, on the wanted device.
        """
        if self.shares_B is None:
            return None
        key = rank, like.dtype, like.device
        if key not in self._open:  # layers of one rank share it
            ranks_B = self.schedule.ranks_B(self.shares_B, rank)
            self._open[key] = (torch.arange(rank) < ranks_B[:, None]).to(like.device, like.dtype)
        return self._open[key]


def for_rows(open_BC: Tensor, h: Tensor) -> Tensor:
    """The mask in a form that multiplies a layer's h [..., C], whose first dimension holds the rows.

    Where there are more of them than rows, such as the tokens of all rows in one list, each row has as many.

    Raises:
        UsageError: they cannot be dealt out to the rows.
    """
    if len(open_BC) == 1:
        return open_BC[0]
    each, rest = divmod(len(h), len(open_BC))
    if rest:
        raise UsageError(
            f"a layer is given {list(h.shape)} numbers for {len(open_BC)} timesteps, which do not tell which is whose",
            "leave the layer out of adapter.target_modules",
        )
    open_BC = open_BC.repeat_interleave(each, 0) if each > 1 else open_BC
    return open_BC.view(len(h), *[1] * (h.ndim - 2), open_BC.shape[1])


def follow(model: nn.Module, clock: Clock) -> RemovableHandle:
    """Set the clock at each pass of a denoiser from now on; returns what ends it.

    Raises:
        UsageError: the model is told no timestep.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    if ARGUMENT not in parameters:
        raise UsageError(
            f"{type(model).__name__} is told no timestep, so there is no rank by timestep",
            "use it on the denoiser of an image pipeline",
        )
    place = parameters.index(ARGUMENT)

    def look(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        timesteps = named[ARGUMENT] if ARGUMENT in named else args[place]
        clock.set(timesteps, clock.step if model.training else 0)

    return model.register_forward_pre_hook(look, with_kwargs=True)
