"""DoRA: components below a magnitude.

    W' = m · (W + s BA) / ‖W + s BA‖          the norm is over the inputs of each output

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.lora.layer import ComponentLinear


class DoraLinear(ComponentLinear):
    """A frozen linear layer, the sum of its components, and a magnitude for each output.

    Args:
        base: the frozen layer.
        scale: s.
        magnitude_O: m; trained where its `requires_grad` is set.
        weight: gives W as [O, I] in fp32; called when the factors have changed, so that W need not be in memory.
        bias_O: the base's, which no magnitude scales.
        dropout: probability of dropping an input of the update while training.

    Source: Liu et al. 2024, DoRA (arXiv 2402.09353), equations 5 and 11: the norm carries no gradient.
    """

    def __init__(
        self,
        base: nn.Module,
        scale: float,
        magnitude_O: Tensor,
        weight: Callable[[], Tensor],
        bias_O: Tensor | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, scale, dropout)
        self.magnitude_O = nn.Parameter(magnitude_O.clone(), requires_grad=False)
        self.weight_OI = weight
        self.bias_O = None if bias_O is None else bias_O.detach()
        self._of: Tensor | None = None
        self._base_O: Tensor | None = None  # ‖W‖²

    def finished(self, y: Tensor) -> Tensor:
        # A layer without components has no magnitude either: no file format could keep it.
        if self.gate is not None and not self.gate.any():
            return y
        if self.bias_O is not None:
            y = y - self.bias_O
        # Not y * ratio: in bf16 a ratio near 1 would lose what was learned.
        y = torch.addcmul(y, y, (self.magnitude_O / self.norm_O() - 1).to(y.dtype))
        return y if self.bias_O is None else y + self.bias_O

    @torch.no_grad()
    def delta_OI(self) -> Tensor:
        """W' - W as a dense [O, I] matrix; unlike LoRA's it depends on W."""
        W = self.weight_OI().to(self.a_CI)
        return (self.magnitude_O / self.norm_O())[:, None] * (W + super().delta_OI()) - W

    @torch.no_grad()
    def norm_O(self) -> Tensor:
        """‖W + s B diag(gate) A‖ over the inputs of each output, from thin products."""
        if self._of is not self.a_CI or self.training:
            W = self.weight_OI().to(self.a_CI)
            self._base_O = W.square().sum(1) if self._base_O is None else self._base_O
            self._with_a_OC = F.linear(W, self.a_CI)
            # An optimizer changes a_CI in place, so what a training step computed is not for the evaluation after it.
            self._of = None if self.training else self.a_CI
        b_OC = self.scale * self.b_OC
        if self.gate is not None:
            b_OC = b_OC * self.gate
        assert self._base_O is not None
        cross_O = (self._with_a_OC * b_OC).sum(1)
        own_O = ((b_OC @ (self.a_CI @ self.a_CI.T)) * b_OC).sum(1)
        return (self._base_O + 2 * cross_O + own_O).clamp_min(0).sqrt()
