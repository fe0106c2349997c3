"""A layer that uses its first components, as many as the timestep of a row allows. See schedule.py.

Dimensions: B rows of a batch, C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.nested import from_the_end
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.timesteps.clock import Clock, follow, for_rows
from dynlora_cli.lora.timesteps.schedule import Schedule


class TimedLinear(ComponentLinear):
    """A frozen linear layer plus the sum of its first components: Σ m_i(t) b_i a_iᵀ.

    Args:
        base, scale, dropout: of `ComponentLinear`.
        clock: knows the timestep of each row.
    """

    turns = False  # the order is what they are used by

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, *, clock: Clock) -> None:
        super().__init__(base, scale, dropout)
        self.clock = clock

    def fusable(self, x: Tensor) -> bool:
        return self.clock.shares_B is None and super().fusable(x)

    def update(self, x: Tensor, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        h_C = F.linear(x, a_CI) * self.scale
        if self.gate is not None:
            h_C = h_C * self.gate.repeat_interleave(self.terms, -1)
        open_BC = self.clock.open_BC(len(a_CI), h_C)
        if open_BC is not None:
            h_C = h_C * for_rows(open_BC, h_C)
        return F.linear(h_C, b_OC)

    def ranked(self, scores_C: Tensor) -> Tensor:
        """The last one always goes first, see `from_the_end`."""
        return from_the_end(scores_C)

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self.clock.step = step


def in_time(model: nn.Module, layers: Iterable[ComponentLinear]) -> list[RemovableHandle]:
    """Give layers that go by the timestep one clock, which follows their model; returns what ends it, if there are any.

    Raises:
        UsageError: the model is told no timestep.
    """
    timed = [layer for layer in layers if isinstance(layer, TimedLinear)]
    for layer in timed:
        layer.clock = timed[0].clock
    return [follow(model, timed[0].clock)] if timed else []


def schedule_of(pool: Pool) -> Schedule | None:
    """The schedule that the layers of a pool go by; None where they always use all components."""
    return next((layer.clock.schedule for layer in pool.layers.values() if isinstance(layer, TimedLinear)), None)
