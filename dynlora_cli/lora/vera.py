"""VeRA's layer: a frozen linear layer plus diag(b) B diag(d) A, with A and B shared by all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear

D_INITIAL = 0.1


class VeraLinear(ComponentLinear):
    """A frozen linear layer plus diag(b) B diag(d) A. a_CI holds d, as [C, 1]; b_OC nothing.

    Args:
        base: the frozen layer.
        dropout: probability of dropping an input of the update while training.
        pair: A [R, inputs of the widest layer] and B [outputs of the widest layer, R], shared by all layers.
        seed: that A and B were drawn with.
    """

    turns = plain = False

    def __init__(self, base: nn.Module, dropout: float, pair: tuple[Tensor, Tensor], seed: int) -> None:
        super().__init__(base, 1.0, dropout)
        self.pair, self.seed = pair, seed
        self.lambda_b_O = nn.Parameter(torch.zeros(self.out_features, device=pair[0].device))
        self._of: Tensor | None = None

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:  # noqa: ARG004
        return 1, 0

    @staticmethod
    def most(d_in: int, d_out: int) -> int:  # noqa: ARG004
        return 1024  # above what the paper uses; components may be more than the layer is wide

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:  # noqa: ARG002
        a_CI.fill_(D_INITIAL)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self._of is not self.survivors_C:
            self._A_CI, self._B_OC = self._projections()
            self._of = self.survivors_C
        return self.a_CI * self._A_CI, self.lambda_b_O[:, None] * self._B_OC

    def _projections(self) -> tuple[Tensor, Tensor]:
        """A and B of the components that are left."""
        A_CI, B_OC = self.pair[0][:, : self.in_features], self.pair[1][: self.out_features]
        if self.count < len(A_CI):  # else views do, which take no memory
            kept_C = self.survivors_C.to(A_CI.device)
            A_CI, B_OC = A_CI[kept_C], B_OC[:, kept_C]
        return A_CI.to(self.a_CI.dtype), B_OC.to(self.a_CI.dtype)
