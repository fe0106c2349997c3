"""ARD-LoRA: a learned rank factor for each layer.

What it does
    ΔW = s·Σ g_i b_i a_iᵀ with g_i = sigmoid(k·α - i + ½), i from 1 to the k components at the start: α in [0, 1] is the
    share of the layer's components that are open, the last ones closing first. A penalty λ(|α| + β·|α - α before|) per
    layer draws α down and keeps it calm. Pruning takes what is closed first, since its magnitude and gradient fade.
    α is no component's and does not count in the budget.

When to use it
    To compare with. The paper rounds α·r0 to a rank, through which no gradient passes; the sigmoid stands for that.

Reference
    ARD-LoRA, arXiv 2506.18267. Saved as the plain LoRA that it is, g in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import penalty_weight, put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio", "penalty")
SPARSITY = 0.01  # λ, over the mean of all layers
CALM = 0.1  # β


class Layer(ComponentLinear):
    """A frozen linear layer plus s·B diag(g) A, g from the layer's rank factor."""

    turns = plain = False

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, weight: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.rank_factor = nn.Parameter(torch.ones((), device=base.weight.device))  # type: ignore[arg-type]
        self.before = torch.ones(())
        self.penalty_weight, self.first = weight, 0
        self._of: Tensor | None = None

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        super().start(a_CI, b_OC, generator)
        self.first = len(a_CI)

    def gates_C(self) -> Tensor:
        """g of the components that are left."""
        if self._of is not self.survivors_C:  # a copy to a GPU in every pass would wait for it
            self._places_C, self._of = self.survivors_C.to(self.rank_factor.device), self.survivors_C
        return (self.first * self.rank_factor - self._places_C - 0.5).sigmoid()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a_CI, self.b_OC * self.gates_C()

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self.before = self.rank_factor.detach().clone()

    def penalty(self) -> Tensor | None:
        if not self.count or not self.penalty_weight:
            return None
        return self.penalty_weight * (self.rank_factor.abs() + CALM * (self.rank_factor - self.before).abs())

    @torch.no_grad()
    def after_update(self, rate: float) -> None:  # noqa: ARG002
        self.rank_factor.clamp_(0, 1)


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    weight = penalty_weight(options, SPARSITY) / len(targets)
    return put(model, targets, start, options, seed, partial(Layer, weight=weight))
