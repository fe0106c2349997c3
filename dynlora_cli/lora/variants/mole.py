"""MoLE: in each layer, a gate looks at what all adapters would add there, and shares the weight among them.

What it does
    With u_e = B_e A_e x and u all of them one after the other: shares = softmax(G u/‖u‖ / τ), with G and τ trained for
    each layer. G begins at 0, so all adapters begin alike. u is never made: G u is (G_e B_e)(A_e x), summed, and ‖u‖²
    is (A_e x)ᵀ(B_eᵀB_e)(A_e x), summed. A balancing loss, -Σ log of an adapter's mean share over layers and tokens,
    keeps one adapter from taking all. Adapters that are `off` leave their shares to the others.

When to use it
    Where the adapters differ in what they say more than the layers' inputs do.

Reference
    Wu et al. 2024, MoLE (arXiv 2404.13628). There the gate sees a block's output for a whole text; here it is one of
    each layer and token, so that a token needs no later ones. The weight of the balancing loss is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.lora.routers import gates as token_gates

if TYPE_CHECKING:
    from dynlora_cli.lora.multi import MultiLinear

has_components = False
routes = True
takes = ()
OPTIONS = {
    "temperature": {"type": "float", "default": 1.0, "above": 0, "help": "τ at the start; each layer trains its own."},
    "balance": {"type": "float", "default": 0.01, "at_least": 0, "help": "Weight of the balancing loss."},
}
SMALLEST = 1e-6  # of ‖u‖: where no adapter says anything, nothing is divided by 0


class Gates(token_gates.Gates):
    """A gate of each layer: G [E', E' x O], as [E', E', O], and log τ."""

    title = "MoLE"

    def __init__(self, layers: Mapping[str, MultiLinear], names: Sequence[str], options: Any, hidden: int = 0) -> None:
        super().__init__(layers, names, options, hidden)
        self._grams: dict[str, Tensor] = {}
        self._shares: dict[int, list[Tensor]] = defaultdict(list)  # mean shares since the last step, by column

    def start(self, layer: MultiLinear) -> dict[str, Tensor]:
        count = len(layer.adapters)
        return {
            "gate_EEO": torch.zeros(count, count, layer.out_features),
            "log_temperature": torch.tensor(float(self.options.temperature)).log(),
        }

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:  # noqa: ARG002
        with torch.autocast(h_NR.device.type, enabled=False):
            h_NR = h_NR.float()
            if self.options.balance and layer.training and torch.is_grad_enabled():
                # A graph of its own, which is alive until the step: that of the text is freed before.
                for column, share in zip(layer.adapters, self._of(layer, h_NR.detach()).mean(0), strict=True):
                    self._shares[column].append(share)
            return self._of(layer, h_NR)

    def penalty(self) -> Tensor | None:
        if not self._shares:
            return None
        means = [torch.stack(shares).mean() for shares in self._shares.values()]
        self._shares.clear()
        return -self.options.balance * torch.stack(means).log().sum()

    def _of(self, layer: MultiLinear, h_NR: Tensor) -> Tensor:
        gate_EEO, temperature = self.of(layer, "gate_EEO"), self.of(layer, "log_temperature").exp()
        parts = [gate_EEO[:, place] @ layer.b_OR[:, part] for place, part in enumerate(layer.slices)]
        size_N = ((h_NR @ self._gram(layer)) * h_NR).sum(-1).clamp_min(SMALLEST**2).sqrt()
        return self.shares((h_NR @ torch.cat(parts, 1).T) / size_N[:, None] / temperature, layer)

    def _gram(self, layer: MultiLinear) -> Tensor:
        """B_eᵀB_e of all adapters on the diagonal; they are frozen. [R, R]"""
        if layer.name not in self._grams:
            blocks = [layer.b_OR[:, part].T @ layer.b_OR[:, part] for part in layer.slices]
            self._grams[layer.name] = torch.block_diag(*blocks)
        return self._grams[layer.name]
