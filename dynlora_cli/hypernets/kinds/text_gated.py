"""Components that all tasks share, and gates on them that are written from a description: B diag(z(text)) A.

Source: Abdalla et al. 2025, Zhyper (arXiv 2510.19733), with z diagonal.

Dimensions, as suffixes of names:
    B  descriptions      C  components of a layer      P  places      M  places of one module
    I  inputs of a layer (d_in)      O  outputs (d_out)      D  numbers of a description's vector
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_cli.hypernets.hypernet import Hypernet, Place, Written, by_module
from dynlora_cli.hypernets.trunk import Trunk

READS = "description"


class Net(Hypernet):
    """A pool of components and a trunk whose heads write a gate for each of them.

    Heads begin at 0, and a gate is 1 + what a head writes: at first every text gets the plain LoRA, whose B is 0.
    """

    def __init__(self, places: Sequence[Place], options: Any, width: int, scale: float) -> None:
        super().__init__(places, options, width, scale)
        self.trunk = Trunk(places, width, options.latent_size, options.hidden_size)
        self.heads = nn.ModuleList(
            nn.Linear(options.hidden_size, max(place.rank for place in own), bias=False)
            for own in by_module(places).values()
        )
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
        self.a_CI = nn.ParameterList(torch.empty(place.rank, place.d_in) for place in places)
        self.b_OC = nn.ParameterList(torch.zeros(place.d_out, place.rank) for place in places)
        for a_CI in self.a_CI:
            nn.init.kaiming_uniform_(a_CI, a=math.sqrt(5))  # as PEFT starts A

    def forward(self, condition: Tensor) -> dict[str, Written]:
        gates = self._gates(self.trunk(condition))
        return {
            place.name: Written(a_CI, b_OC, gates[at][:, : place.rank])
            for at, (place, a_CI, b_OC) in enumerate(zip(self.places, self.a_CI, self.b_OC, strict=True))
        }

    def _gates(self, features_BPH: Tensor) -> dict[int, Tensor]:
        """The gates of every place, by its index: [B, C], the scale in them."""
        found: dict[int, Tensor] = {}
        for name, head in zip(self.trunk.names, self.heads, strict=True):
            index_M = self.trunk.of_module(name)
            z_BMC = self.scale * (1 + head(features_BPH[:, index_M]))
            found |= dict(zip(index_M.tolist(), z_BMC.unbind(1), strict=True))
        return found
