"""Which mix of adapters each request of a batch wants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Requests of one mix that follow one another: which, and the weights that are not 0, by column of the bank."""

    start: int
    stop: int
    weights: dict[int, float]


class Mixes:
    """The mixes of a batch, sorted out once for all layers and all forward passes.

    Attributes:
        runs: of all requests, in their order.
        used: columns of the bank that any request uses.
        one: whether all requests have one mix, so that it does not matter whose the rows are.
        groups: the mixes of as many requests each, one group after the other.
        plans, layouts: what each layer made of it when it first came by, see lora/ways/plan.py.
    """

    def __init__(self, weights_BE: Tensor) -> None:
        self.weights_BE = weights_BE
        self.trained = weights_BE.requires_grad
        self.runs: list[Run] = []
        for row, line in enumerate(weights_BE.tolist()):
            weights = {column: weight for column, weight in enumerate(line) if weight}
            if self.runs and self.runs[-1].weights == weights:
                self.runs[-1] = self.runs[-1]._replace(stop=row + 1)
            else:
                self.runs.append(Run(row, row + 1, weights))
        # A weight of 0 has a gradient, too.
        columns = range(weights_BE.shape[1]) if self.trained else (c for run in self.runs for c in run.weights)
        self.used = set(columns)
        lengths = {run.stop - run.start for run in self.runs}
        # Requests that follow one another are one group, if the groups come out equal; else each is one.
        each = len(lengths) == 1
        self.groups = [run.weights for run in self.runs for _ in range(1 if each else run.stop - run.start)]
        self.one = len(self.weights_BE) == 1 or (len(self.runs) == 1 and not self.trained)
        self.plans: dict[Any, Any] = {}
        self.layouts: dict[Any, Any] = {}
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The weights on a device, in fp32 at least. [B, E]"""
        if device not in self._on:
            self._on[device] = self.weights_BE.to(device)
        return self._on[device]
