"""Components with a trained number each, which multiplies them: ΔW = s·Σ g_i b_i a_iᵀ. Base of several variants."""

from __future__ import annotations

from torch import Tensor

from dynlora_cli.lora.layer import ComponentLinear


class GatedLinear(ComponentLinear):
    """A frozen linear layer plus s·B diag(g) A. The last column of a_CI is what the gates are made of."""

    turns = plain = False

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        return d_in + 1, d_out

    def gates_C(self, raw_C: Tensor) -> Tensor:
        """g, from the trained numbers."""
        return raw_C

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a_CI[:, :-1], self.b_OC * self.gates_C(self.a_CI[:, -1])

    def mean_parts_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        return super().mean_parts_C(a_CI[:, :-1], b_OC) + a_CI[:, -1]

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:  # noqa: ARG002
        assert self.a_CI.grad is not None
        return (a_CI * self.a_CI.grad)[:, :-1].sum(1)
