"""DyLoRA: components in order, so that the first few of a layer are an adapter of their own.

What it does
    In every training step all layers use only their first components; how large a share is drawn anew each time. What
    stands early is trained more often and comes to matter most. Pruning in training cuts each layer from its end. The
    first components of each saved layer are an adapter of that rank (`dynlora prune` goes by its own scores, not by
    order).

When to use it
    Where one training has to serve several sizes.

Reference
    DyLoRA, arXiv 2210.07558, without its option to train the last of the drawn components alone; s is constant here,
    where the paper divides by the drawn rank. Saved as the plain LoRA that it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variant import put

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Adapter

has_components = True
takes = ("alpha", "dropout", "lora_plus_ratio")


class Layer(ComponentLinear):
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
        """Each component gets the highest score among itself and those behind it, so the last one always goes first."""
        return scores_C.flip(0).cummax(0).values.flip(0)

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self.share = 1 - random.Random(f"{self.seed} {step}").random()  # the same in all layers and processes

    def after_update(self, rate: float) -> None:  # noqa: ARG002
        self.share = 1.0


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int) -> Pool:
    """Replace every target by a layer that holds it."""
    return put(model, targets, start, options, seed, partial(Layer, seed=seed))
