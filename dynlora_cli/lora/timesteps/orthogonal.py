"""Components that start orthogonal, and count from where they started: the base's function at the start.

    y = W x + s · Σ_i m_i(t) (λ_i p_i q_iᵀ - λ⁰_i p⁰_i q⁰_iᵀ) x          λ⁰, p⁰ and q⁰ are those of the start

q⁰ and p⁰ are orthonormal, λ⁰ the smallest singular values of a matrix of the layer's shape whose entries have standard
deviation 1/r. All three train. Saved, a component is two products, which stand together.

Source: T-LoRA, arXiv 2507.05964, Ortho-LoRA, with its last singular values.

Dimensions: C components, R products (2 C), I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from dynlora_cli.lora.directions import orthonormal_rows
from dynlora_cli.lora.pissa import norms_of_difference
from dynlora_cli.lora.timesteps.clock import Clock
from dynlora_cli.lora.timesteps.layer import TimedLinear

DRAWS = 4  # of the matrix whose singular values are taken


class OrthogonalLinear(TimedLinear):
    """A frozen linear layer plus what its components have become since the start.

    The leaves hold q_i, λ_i, q⁰_i and λ⁰_i side by side, [C, 2 (I + 1)], and p_i over p⁰_i, [2 O, C], so that a start
    goes wherever its component goes. Weight decay draws both to zero, and with them the update.
    """

    plain = False
    terms = 2

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0, *, clock: Clock) -> None:
        super().__init__(base, scale, dropout, clock=clock)
        self.of_start_C = torch.zeros(())  # λ⁰_i dL/dλ⁰_i of the step in hand

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        return 2 * (d_in + 1), 2 * d_out

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        rank = len(a_CI)
        q_CI, p_CO = (orthonormal_rows(torch.empty(0, d), rank, generator) for d in (self.in_features, len(b_OC) // 2))
        lambda_C1 = smallest_values(self.out_features, self.in_features, rank)[:, None]
        a_CI.copy_(torch.cat([q_CI, lambda_C1, q_CI, lambda_C1], 1))
        b_OC.copy_(torch.cat([p_CO.T, p_CO.T]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """[q_0, q⁰_0, q_1, ...] and [λ_0 p_0, -λ⁰_0 p⁰_0, ...]: a component stands together. [R, I], [O, R]"""
        (a, a_start), (b, b_start) = self._pairs()
        return torch.stack([a, a_start], 1).flatten(0, 1), torch.stack([b, -b_start], 2).flatten(1)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """q and q⁰ [C, I], λ p and λ⁰ p⁰ [O, C]."""
        q, lambda_C1, q_start, lambda_start_C1 = self.a_CI.split([self.in_features, 1] * 2, 1)
        p, p_start = self.b_OC.chunk(2)
        return (q, q_start), (p * lambda_C1[:, 0], p_start * lambda_start_C1[:, 0])

    @torch.no_grad()
    def settle_gradient(self) -> None:
        """Note the gradient of λ⁰ for `gate_gradient_C`, then set that of the start to zero: it does not train."""
        assert self.a_CI.grad is not None
        assert self.b_OC.grad is not None
        self.of_start_C = self.a_CI[:, -1] * self.a_CI.grad[:, -1]
        self.a_CI.grad[:, self.in_features + 1 :].zero_()
        self.b_OC.grad[self.out_features :].zero_()

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:  # noqa: ARG002
        """λ_i dL/dλ_i + λ⁰_i dL/dλ⁰_i: the gate stands before both products."""
        assert self.a_CI.grad is not None
        return a_CI[:, self.in_features] * self.a_CI.grad[:, self.in_features] + self.of_start_C

    @torch.no_grad()
    def magnitudes_C(self) -> Tensor:
        (a, a_start), (b, b_start) = self._pairs()
        return self.scale * norms_of_difference(a, b, a_start, b_start)


@cache
def smallest_values(d_out: int, d_in: int, rank: int) -> Tensor:
    """The last `rank` singular values of a random matrix [d_out, d_in] with entries of N(0, 1/rank), largest first.

    They hardly differ from draw to draw, so all layers of a shape have the same: the mean of a few draws. Singular
    vectors of such a matrix do not depend on them, and any orthonormal ones that are drawn at random serve as well.
    """
    matrices = torch.randn(DRAWS, d_out, d_in, generator=torch.Generator().manual_seed(0)) / rank
    return torch.linalg.svdvals(matrices).mean(0)[-rank:]
