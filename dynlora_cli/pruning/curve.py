"""How the loss depends on the size of an adapter that is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.pruning.posthoc import Order
from dynlora_cli.runs import events
from dynlora_cli.runs.events import Emit

POINTS = 7


@dataclass
class Curve:
    """Loss against size, point by point as it is measured.

    Args:
        order: of the components.
        loss_of: measures an adapter, nats per target; None: there are no rows, and a point has the energy alone.
        emit: takes every point that is measured.
        known: the loss of the whole adapter, where somebody has measured it already.
    """

    order: Order
    loss_of: Callable[[Adapter], float] | None
    emit: Emit
    known: float | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    def loss(self, parameters: int) -> float:
        """Held-out loss with the best components within so many parameters; each size is measured once."""
        keep_K, _ = self.order.keep(parameters)
        kept = int(self.order.costs_K[keep_K].sum())
        for point in self.points:
            if point["parameters"] == kept:
                return point["loss"]
        return self._measure(keep_K, kept)["loss"]

    def measure_sizes(self, target: int) -> None:
        """Measure sizes from all to half the target, evenly on a logarithmic scale, the target among them."""
        full, least = self.order.adapter.parameters, max(self.order.least, target // 2)
        ratio = (least / full) ** (1 / (POINTS - 1))
        for parameters in sorted({*(round(full * ratio**i) for i in range(POINTS)), target}, reverse=True):
            self.loss(max(parameters, self.order.least))

    def _measure(self, keep_K: torch.Tensor, kept: int) -> dict[str, Any]:
        point = {
            "parameters": kept,
            "components": int(keep_K.sum()),
            "energy": self.order.energy_kept(keep_K),
            "loss": self._loss(keep_K),
        }
        if self.loss_of:
            self.emit(events.point(point))
        self.points.append(point)
        self.points.sort(key=lambda point: -point["parameters"])
        return point

    def _loss(self, keep_K: torch.Tensor) -> float | None:
        if self.loss_of is None:
            return None
        if self.known is not None and bool(keep_K.all()):
            return self.known
        return self.loss_of(self.order.cut(keep_K))
