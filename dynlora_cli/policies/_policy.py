"""What a pruning policy is: a file in this folder with these two names.

    needs_gradients: bool
        True: scores are of the time before an event, from the gradients since the last one.
        False: scores are of the values as they stand, after they were turned into the SVD basis.

    scores(pool, gradients, generator) -> Tensor
        What each component is worth per number it holds; higher is better. [K], finite. A policy scores and never
        decides: `rank.select_K` does, for all policies alike.

Dimensions: K components of the pool.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.gradients import GateGradients


class Policy(Protocol):
    """The shape of a policy's module."""

    needs_gradients: bool

    def scores(self, pool: Pool, gradients: GateGradients, generator: torch.Generator) -> Tensor:
        """Worth of every component per number it holds. [K]"""
