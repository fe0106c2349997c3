"""SoRA: gates that a soft threshold draws to exactly zero.

What it does
    ΔW = s·Σ g_i b_i a_iᵀ with g = 1 at the start. After every optimizer step each gate comes nearer to zero by the
    learning rate times `adapter.penalty`, and stays at zero unless the loss pulls it away: the proximal step of an
    L1 penalty. Pruning takes small gates first, as their components have little magnitude and gradient. With the
    default 0.1 a gate that the loss leaves alone loses a tenth of the summed learning rates, so a short run thins gates
    and zeroes few; nearer to 1 the threshold is as strong as a step of Adam.

When to use it
    To see how sparse a task wants its ranks to be.

Reference
    SoRA, arXiv 2311.11696, equations 6 to 8. Saved as the plain LoRA that it is, g in B.
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

has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio", "penalty")
THRESHOLD = 0.1  # per unit of learning rate


class Layer(GatedLinear):
    """A frozen linear layer plus s·B diag(g) A, g under a soft threshold."""

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, threshold: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.threshold = threshold

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        super().start(a_CI[:, :-1], b_OC, generator)
        a_CI[:, -1] = 1

    @torch.no_grad()
    def after_update(self, rate: float) -> None:
        gate_C = self.a_CI[:, -1]
        gate_C.copy_(gate_C.sign() * (gate_C.abs() - rate * self.threshold).clamp_min(0))


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, partial(Layer, threshold=penalty_weight(options, THRESHOLD)))
