"""SingLoRA: one matrix instead of two; each component is multiplied with itself.

What it does
    ΔW = s·u·Σ v_i v_iᵀ, both sides cut to the layer's shape, with u rising from 0 to 1 over the first tenth of the run.
    v is random from the beginning, so without u the start would not be the base. A component holds max(d_in, d_out)
    numbers, so the same budget holds about twice as many. Pruning removes v_i.

When to use it
    To compare with. On a square layer the update is symmetric and positive: it writes in the directions that it reads,
    where LoRA chooses the two apart.

Reference
    SingLoRA, arXiv 2507.05566. Saved as the plain LoRA that it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 0.7  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("alpha", "dropout")
RAMP = 0.1  # of the run


class Layer(ComponentLinear):
    """A frozen linear layer plus s·u·Σ v_i v_iᵀ. a_CI holds v_i, b_OC nothing."""

    turns = plain = False

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.ramp = torch.zeros((), device=base.weight.device)  # type: ignore[arg-type]  # u

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        return max(d_in, d_out), 0

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:  # noqa: ARG002
        bound = 1 / math.sqrt(self.a_width)
        a_CI.uniform_(-bound, bound, generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.a_CI[:, : self.in_features], self.a_CI[:, : self.out_features]
        return a, self.ramp * b.T

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        return super().gate_gradient_C(a_CI, b_OC) / 2  # v stands on both sides

    def begin_step(self, step: int, total_steps: int) -> None:
        self.ramp.fill_(min(1.0, step / max(1.0, RAMP * total_steps)))


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, Layer)
