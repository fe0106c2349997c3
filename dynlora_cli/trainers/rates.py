"""The components' own learning rate, in a trainer whose schedule knows nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynlora_cli.errors import UsageError


class CoupledRate:
    """Raises the learning rate of the components for one step of the optimizer.

    Between the steps the optimizer's groups are the trainer's own, since its schedule and its checkpoints know them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._groups: list[dict[str, Any]] | None = None

    def rate(self, leaves: Sequence[nn.Parameter]) -> float:
        """The learning rate of the components as it stands now."""
        ids = {id(leaf) for leaf in leaves}
        rates = [g["lr"] for g in self.optimizer.param_groups if any(id(p) in ids for p in g["params"])]
        return float(rates[0]) if rates and rates[0] is not None else 0.0

    def raised(self, leaves: Sequence[nn.Parameter], factor: float) -> None:
        """Multiply the rate of these leaves, until `lower`; other parameters of their groups keep theirs.

        Raises:
            UsageError: the optimizer has no rate that could be multiplied.
        """
        if factor == 1:
            return
        ids = {id(leaf) for leaf in leaves}
        groups = []
        for group in self.optimizer.param_groups:
            ours = [parameter for parameter in group["params"] if id(parameter) in ids]
            others = [parameter for parameter in group["params"] if id(parameter) not in ids]
            if ours and group.get("lr") is None:
                raise UsageError(
                    f"optimizer {type(self.optimizer).__name__} finds its own learning rate, which lr_coupling cannot "
                    "raise",
                    "write `DynamicRankCallback(..., lr_coupling=0)`, or give the optimizer a rate",
                )
            groups += [{**group, "params": ours, "lr": group["lr"] * factor}] if ours else []
            groups += [{**group, "params": others}] if others or not ours else []
        self._groups, self.optimizer.param_groups = self.optimizer.param_groups, groups

    def lower(self) -> None:
        """The groups as they were."""
        if self._groups is not None:
            self.optimizer.param_groups, self._groups = self._groups, None
