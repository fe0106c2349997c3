"""A router over frozen adapters as what trains in a run: the same methods as of a `Pool` and of a `WholeModel`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.lora.whole import WithoutComponents

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.routers.gates import Gates


class Routed(WithoutComponents):
    """A router that trains, see lora/whole.py.

    Args:
        gates: its numbers; already asked by the model's layers.
        owners: the adapter that each training row belongs to, as its column by `Example.row`; empty where rows belong
            to none.
        members: the adapters by name, to be saved beside the router.
        watching: shows the router the model's passes, from now on.
    """

    def __init__(
        self,
        gates: Gates,
        owners: Mapping[int, int],
        members: Mapping[str, Any],
        watching: AbstractContextManager[None],
    ) -> None:
        super().__init__()
        self.gates, self.owners, self.members, self.watching = gates, owners, members, watching
        watching.__enter__()

    def to(self, device: torch.device) -> Routed:  # noqa: ARG002
        """Stay on the device that the model was loaded to."""
        return self

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"params": list(self.gates.parameters()), "coupled": False}]

    def see(self, batch: Batch) -> None:
        columns = [self.owners[row] for row in batch.rows if row in self.owners]
        known = bool(columns) and len(columns) == len(batch.rows)
        self.gates.owner_B = torch.tensor(columns, device=batch.labels.device) if known else None

    def penalty(self) -> Tensor | None:
        return self.gates.penalty()
