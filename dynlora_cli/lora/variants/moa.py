"""MoA: each token weighs adapters of any kinds by sigmoids of its own, so that several can speak fully, or none.

What it does
    g_e = sigmoid(w_e·x + b_e) in each layer, all from 0 at the start: half of each adapter. Soft: their weighted sum.
    `sparse: true`: an adapter whose g_e is below the token's threshold, `threshold_max`·sigmoid(w·x + b), is left out;
    the threshold learns through a sigmoid in place of that step. An adapter that is no plain LoRA (a DoRA, a HiRA) adds
    what its own layer returns above the base's.

When to use it
    Where adapters are of different kinds or in different layers, and where they add up rather than compete.

Reference
    Cao et al. 2025, MoA (arXiv 2506.05928), code DCDmllm/MoA. There the adapters train as well; here they are frozen,
    and the gradient of the threshold is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynlora_cli.lora.routers import gates as token_gates

if TYPE_CHECKING:
    from dynlora_cli.lora.multi import MultiLinear

has_components = False
routes = True
takes = ()
OPTIONS = {
    "sparse": {"type": "bool", "default": False, "help": "Adapters below a learned threshold are left out."},
    "threshold_max": {
        "type": "float", "default": 0.5, "above": 0, "at_most": 1, "help": "The highest that threshold, if sparse."
    },
}  # fmt: skip
WIDTH = 0.1  # of the sigmoid through which a threshold learns


class Gates(token_gates.Gates):
    """w_e and b_e of each layer's adapters and, where sparse, the w and b of its threshold as one more of them."""

    title = "MoA"
    mixes_kinds = True

    def start(self, layer: MultiLinear) -> dict[str, Tensor]:
        count = len(layer.adapters) + self.options.sparse
        return {"weight_EI": torch.zeros(count, layer.in_features), "bias_E": torch.zeros(count)}

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:  # noqa: ARG002
        weight_EI, bias_E = self.of(layer, "weight_EI"), self.of(layer, "bias_E")
        with torch.autocast(x_NI.device.type, enabled=False):
            sigmoids = (x_NI.to(weight_EI.dtype) @ weight_EI.T + bias_E).sigmoid()
        gates_NE = sigmoids[:, : len(layer.adapters)]
        if self.options.sparse:
            above_NE = gates_NE - self.options.threshold_max * sigmoids[:, -1:]
            soft_NE = (above_NE / WIDTH).sigmoid()
            gates_NE = gates_NE * ((above_NE >= 0).to(soft_NE) + soft_NE - soft_NE.detach())
        if self.off:
            gates_NE = gates_NE.masked_fill(self.off_of(layer), 0.0)
        return gates_NE
