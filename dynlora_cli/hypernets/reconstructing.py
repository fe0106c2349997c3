"""A hypernetwork that learns to write adapters that exist; the base is asked only where it is measured."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.hypernets.generated import Generated

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.hypernets.targets import Distance


class Reconstructing(Generated):
    """As `Generated`; what it learns from is in `distance`.

    Args:
        parts: those of `Generated`.
        members: the adapters by name.
        distance: from what is written to them.
        adapters: the number of the adapter that is to be written from each condition, by its key.
    """

    def __init__(
        self, *parts: Any, members: Mapping[str, Adapter], distance: Distance, adapters: Mapping[Hashable, int]
    ) -> None:
        super().__init__(*parts)
        self.members, self._distance, self.adapters = members, distance, adapters

    def see(self, batch: Batch) -> None:
        if not torch.is_grad_enabled():
            super().see(batch)

    def distance(self, batch: Batch) -> Tensor:
        """The mean distance to the adapters of a batch's rows, each different condition once: a scalar in fp32."""
        keys = list(dict.fromkeys(map(self.conditions.key, batch.examples)))
        device = batch.labels.device
        self.net.train()
        with torch.autocast(device.type, enabled=False):
            written = self.net(self.conditions.of(keys))
            return self._distance(written, torch.tensor([self.adapters[key] for key in keys], device=device))
