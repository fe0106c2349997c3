"""Components in order, so that the first few of a layer are an adapter of their own: for variant dylora and
`rank.elastic`.

In every training step all layers use the same share of their components, the first ones; it is drawn anew in each step.
What stands early is trained more often, and comes to matter most. The order is what they are for, so no gauge turns
them.

Source: DyLoRA, arXiv 2210.07558; nested representations, arXiv 2205.13147.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear


class NestedLinear(ComponentLinear):
    """A frozen linear layer plus the sum of its first components."""

    turns = plain = False

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(base, scale, dropout)
        self.seed, self.share = seed, 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.share == 1:
            return self.a_CI, self.b_OC
        open_C = torch.arange(self.count, device=self.b_OC.device) < math.ceil(self.share * self.count)
        return self.a_CI, self.b_OC * open_C

    def ranked(self, scores_C: Tensor) -> Tensor:
        """The last one always goes first, see `from_the_end`."""
        return from_the_end(scores_C)

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self.share = 1 - random.Random(f"{self.seed} {step}").random()  # the same in all layers and processes

    def after_update(self, rate: float) -> None:  # noqa: ARG002
        self.share = 1.0


def from_the_end(scores_C: Tensor) -> Tensor:
    """The scores by which components of a layer go from its end: each the highest of itself and those behind it. [C]"""
    return scores_C.flip(0).cummax(0).values.flip(0)
