"""AutoLoRA: the gates of a layer's components share a fixed sum, and are learned on other rows than the components.

What it does
    ΔW = s·Σ g_i b_i a_iᵀ with g = k·softmax(β), k the components at the start, so that g = 1 there. Odd steps train A
    and B, even steps β: within an epoch these are two halves of the rows. (What a step does not train moves on by
    Adam's momentum.) When a component goes, its share passes to the others of its layer.

When to use it
    To compare with. The paper learns β through an unrolled step of A and B (second order) and trains again from scratch
    with the ranks found; here β takes the first-order gradient, and the run goes on with what it has.

Reference
    AutoLoRA, arXiv 2403.09113, equations 2 to 6. Saved as the plain LoRA that it is, g in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.gated import GatedLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 0.5  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio")


class Layer(GatedLinear):
    """A frozen linear layer plus s·B diag(k softmax β) A; the last column of a_CI is β."""

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.of_gates = False  # the step trains β
        self.first = 0

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        super().start(a_CI[:, :-1], b_OC, generator)
        self.first = len(a_CI)

    def gates_C(self, raw_C: Tensor) -> Tensor:
        if self.gate is not None and self.gate.any():  # what is masked takes no share, as when it is gone
            raw_C = raw_C.masked_fill(self.gate == 0, -torch.inf)
        return self.first * raw_C.softmax(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b, raw = self.a_CI[:, :-1], self.b_OC, self.a_CI[:, -1]
        if self.of_gates:
            return a.detach(), b.detach() * self.gates_C(raw)
        return a, b * self.gates_C(raw.detach())

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        if not self.of_gates:
            return super().gate_gradient_C(a_CI, b_OC)
        # dL/dβ = g (dL/dg - mean of dL/dg weighted by softmax): what one gate gains over the others.
        assert self.a_CI.grad is not None
        return self.a_CI.grad[:, -1]

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self.of_gates = step % 2 == 0


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, Layer)
