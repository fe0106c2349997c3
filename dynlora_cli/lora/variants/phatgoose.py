"""PHATGOOSE: a vector for each layer of each adapter, learned on that adapter's own rows; then the likest two speak.

What it does
    In training a row uses the adapter that it belongs to, and a sigmoid of v·x stands before what that adapter adds in
    a layer; v begins at 0, and nothing else trains. Afterwards each token compares its input with all v, both
    normalised over their numbers, and takes the softmax over the best `top_k`:
    logit = LN(x)·LN(v) / √d_in.

When to use it
    Where adapters come one by one: the vectors of each are learned without the others. A hundred steps are enough.

Reference
    Muqeeth et al. 2024, PHATGOOSE (arXiv 2402.05859), section 3; code r-three/phatgoose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.lora.routers import gates as token_gates

if TYPE_CHECKING:
    from dynlora_cli.lora.multi import MultiLinear

has_components = False
routes = True
own_rows = True
takes = ()
OPTIONS = {
    "top_k": {"type": "int", "default": 2, "at_least": 1, "help": "Adapters that a token uses in a layer, at most."},
}
CONFLICTS = [
    {"with": "dataset.packing", "why": "a packed row holds rows of several adapters", "hint": "set it to false"},
    {
        "with": "dataset.replay",
        "why": "each row teaches the gates of one adapter of the library",
        "hint": "leave it out",
    },
]


class Gates(token_gates.Gates):
    """A vector of the layer's inputs for each of its adapters."""

    title = "PHATGOOSE"

    def start(self, layer: MultiLinear) -> dict[str, Tensor]:
        return {"v_EI": torch.zeros(len(layer.adapters), layer.in_features)}

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:  # noqa: ARG002
        v_EI = self.of(layer, "v_EI")
        with torch.autocast(x_NI.device.type, enabled=False):
            x_NI = x_NI.to(v_EI.dtype)
            owners_NE = self.owners(layer, len(x_NI))
            if owners_NE is not None:
                return owners_NE * (x_NI @ v_EI.T).sigmoid()
            width = (layer.in_features,)
            logits_NE = F.layer_norm(x_NI, width) @ F.layer_norm(v_EI, width).T / layer.in_features**0.5
            return self.shares(logits_NE, layer, self.options.top_k)
