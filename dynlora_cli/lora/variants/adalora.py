"""AdaLoRA: an update in the form of a singular value decomposition, PΛQ, held near it by a penalty.

What it does
    ΔW = s·Σ λ_i p_i q_iᵀ with λ = 0 and p, q normal (0.02) at the start. A penalty on ‖PᵀP - 1‖ and ‖QQᵀ - 1‖ keeps
    the directions apart. With `pruning.policy: sensitivity` components are scored as in AdaLoRA. Other than in PEFT,
    what is pruned is gone from memory and from the step, s does not depend on the rank at the start, and the loss that
    is reported is the task's own.

When to use it
    To compare with: at equal size it is level with plain LoRA under `fisher` (scripts/bench/NOTES.md), and a step costs
    more. Its best learning rate is near 1e-2.

Reference
    AdaLoRA, arXiv 2303.10512, equations 3 and 4. Saved as the plain LoRA that it is, λ in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.gated import GatedLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import penalty_weight, put

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

RATE = 3.0  # its best learning rates as a multiple of those of lora: scripts/bench/variants.md
has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio", "penalty")
ORTHOGONALITY = 0.1  # PEFT's orth_reg_weight is 0.5, over the mean of all layers' matrices; the paper has 0.1 to 0.5


class Layer(GatedLinear):
    """A frozen linear layer plus s·P diag(λ) Q; a_CI holds Q and, in its last column, λ."""

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, weight: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.penalty_weight = weight

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        a_CI[:, :-1].normal_(0, 0.02, generator=generator)
        b_OC.normal_(0, 0.02, generator=generator)

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:  # noqa: ARG002
        """λ · dL/dλ, which equals it. Other than the gradients of P and Q, that of λ holds nothing of the penalty."""
        assert self.a_CI.grad is not None
        return (a_CI * self.a_CI.grad)[:, -1]

    def penalty(self) -> Tensor | None:
        if not self.count or not self.penalty_weight:
            return None
        q_CI, one_CC = self.a_CI[:, :-1], torch.eye(self.count, device=self.a_CI.device)
        grams = self.b_OC.T @ self.b_OC, q_CI @ q_CI.T
        return self.penalty_weight * torch.stack([torch.linalg.norm(gram - one_CC) for gram in grams]).sum()


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    weight = penalty_weight(options, ORTHOGONALITY) / (2 * len(targets))
    return put(model, targets, start, options, seed, partial(Layer, weight=weight))
