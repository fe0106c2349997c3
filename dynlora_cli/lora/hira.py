"""HiRA: components that multiply the weight, entry by entry.

    W' = W ∘ (1 + s BA)

BA has the rank of the components; W ∘ BA can have any, up to the product of the two ranks.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynlora_cli.lora.layer import ComponentLinear


class HiraLinear(ComponentLinear):
    """A frozen linear layer whose weight the sum of the components multiplies.

    Args:
        base: the frozen layer.
        scale: s.
        weight: gives W as [O, I] in fp32; called whenever it is needed, so that W need not be in memory.
        dropout: probability of dropping an input of the update while training.

    Source: Huang et al. 2025, HiRA (ICLR 2025, openreview TwJrTz9cRS), equation 3, with LoRA's s.
    """

    fuse = False
    plain = False

    def __init__(self, base: nn.Module, scale: float, weight: Callable[[], Tensor], dropout: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.weight_OI = weight

    def update(self, x: Tensor, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """(W ∘ s BA) x, [..., O]."""
        # Autograd would save two matrices of the base's size for every layer; they are computed again instead.
        return checkpoint(self._product, x, a_CI, b_OC, self.gate, use_reentrant=False, preserve_rng_state=False)

    def _product(self, x: Tensor, a_CI: Tensor, b_OC: Tensor, gate: Tensor | None) -> Tensor:
        b_OC = self.scale * (b_OC if gate is None else b_OC * gate)
        return F.linear(x, self.weight_OI().to(a_CI) * (b_OC @ a_CI))

    @torch.no_grad()
    def delta_OI(self) -> Tensor:
        """W' - W as a dense [O, I] matrix; unlike LoRA's it depends on W."""
        return self.weight_OI().to(self.a_CI) * super().delta_OI()
