"""What a router by token does on rows: the average weight of each adapter, over the tokens of a row and over layers.

Dimensions: N tokens of a batch, B rows of a batch, T tokens of the longest, R components of a layer, E adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynlora_cli.data.batches import Batch
from dynlora_cli.lora.multi import MultiLinear, TokenGates


class Shares:
    """Hands on what a router says, and keeps count (TokenGates).

    Args:
        inner: the router.
        names: of the bank's adapters.
        rows: how many there are.
    """

    def __init__(self, inner: TokenGates, names: Sequence[str], rows: int) -> None:
        self.inner, self.names = inner, list(names)
        self.weight_RE: NDArray[np.float64] = np.zeros((rows, len(names)))
        self.layers_R: NDArray[np.float64] = np.zeros(rows)
        self._rows: list[int] = []
        self._mask_BT = torch.ones(0, 0)

    def watch(self, batch: Batch, rows: Sequence[int]) -> None:
        """Told of a batch before the model reads it."""
        self._rows = list(rows)
        self._mask_BT = batch.inputs["attention_mask"].double()

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """As the router says."""
        gates = self.inner.gates(layer, x_NI, h_NR)
        self._count(layer, gates.detach().double())
        return gates

    def _count(self, layer: MultiLinear, gates: Tensor) -> None:
        """Of gates of components, an adapter's weight is their mean; for most routers they are all the same."""
        weight_NE = gates
        if gates.shape[1] == len(layer.a_RI):
            weight_NE = torch.stack([gates[:, part].mean(1) for part in layer.slices], 1)
        rows = len(self._rows)
        mask_NE = torch.ones_like(weight_NE)
        if len(weight_NE) == self._mask_BT.numel():  # else this layer sees other tokens than the batch holds
            mask_NE = self._mask_BT.reshape(-1, 1).expand_as(weight_NE)
        total_BE = (weight_NE * mask_NE).view(rows, -1, weight_NE.shape[1]).sum(1)
        tokens_BE = mask_NE.reshape(rows, -1, weight_NE.shape[1]).sum(1)
        self.weight_RE[np.ix_(self._rows, layer.adapters)] += (total_BE / tokens_BE).cpu().numpy()
        self.layers_R[self._rows] += 1

    def of(self, row: int) -> dict[str, float]:
        """The average weight of each adapter on a row, the largest first; a layer that it lacks counts as 0."""
        share_E = self.weight_RE[row] / max(self.layers_R[row], 1.0)
        order = np.argsort(-share_E, kind="stable")
        return {self.names[column]: float(share_E[column]) for column in order if share_E[column]}
