"""Components that count from where they started: the base's function at the start, whatever the values.

    W' = W + s · Σ_i  (b_i a_iᵀ - b⁰_i a⁰_iᵀ)          b⁰ and a⁰ are the values at the start and stay

A start such as PiSSA's takes its own sum out of the frozen weight. Here the weight stays as it is, in 4 bits too, and
the sum is subtracted in the layer. A component that goes takes its start along: what it did returns to what the base
does, and the others are as before. Saved, a component is two products, so it costs twice the numbers.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.magnitudes import MagnitudeLinear

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter


class RelativeLinear(ComponentLinear):
    """A frozen linear layer plus s·(BA - B⁰A⁰).

    The leaves hold a_i and a⁰_i side by side, [C, 2I], and b_i over b⁰_i, [2O, C], so that a start goes wherever its
    component goes: into checkpoints, and away. Weight decay draws all four to zero, and with them the update.
    """

    turns = plain = False  # in another basis a component would be paired with the start of others
    terms = 2

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, scale, dropout)
        self.of_start_C = torch.zeros(())  # <a⁰_i, dL/da⁰_i> of the step in hand

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        return 2 * d_in, 2 * d_out

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        super().start(a_CI[:, : self.in_features], b_OC, generator)

    @torch.no_grad()
    def begin_at(self, a_CI: Tensor, b_OC: Tensor) -> None:
        """Start with these factors."""
        self.a_CI.copy_(torch.cat([a_CI, a_CI], 1))
        self.b_OC.copy_(torch.cat([b_OC, b_OC]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A⁰] and [B, -B⁰]: first the components as they are, then what is subtracted."""
        (a, a_start), (b, b_start) = self._halves()
        return torch.cat([a, a_start]), torch.cat([b, -b_start], 1)

    def _halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        a_start, b_start = self.a_CI[:, self.in_features :], self.b_OC[self.out_features :]
        return (self.a_CI[:, : self.in_features], a_start), (self.b_OC[: self.out_features], b_start)

    @torch.no_grad()
    def settle_gradient(self) -> None:
        """Note the gradient of a⁰ and b⁰ for `gate_gradient_C`, then set it to zero: they do not train."""
        assert self.a_CI.grad is not None
        assert self.b_OC.grad is not None
        a_start_grad = self.a_CI.grad[:, self.in_features :]
        self.of_start_C = (self.a_CI[:, self.in_features :] * a_start_grad).sum(1)
        a_start_grad.zero_()
        self.b_OC.grad[self.out_features :].zero_()

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """<a_i, dL/da_i> + <a⁰_i, dL/da⁰_i>: the gate stands before both products."""
        return super().gate_gradient_C(a_CI, b_OC) + self.of_start_C

    @torch.no_grad()
    def magnitudes_C(self) -> Tensor:
        (a, a_start), (b, b_start) = self._halves()
        return self.scale * norms_of_difference(a, b, a_start, b_start)


def norms_of_difference(a_CI: Tensor, b_OC: Tensor, a_start_CI: Tensor, b_start_OC: Tensor) -> Tensor:
    """‖b_i a_iᵀ - b⁰_i a⁰_iᵀ‖ of every component, from thin products in fp64: the two may be nearly equal. [C]"""
    a, b, a_start, b_start = (part.double() for part in (a_CI, b_OC, a_start_CI, b_start_OC))
    own = a.square().sum(1) * b.square().sum(0) + a_start.square().sum(1) * b_start.square().sum(0)
    cross = (a * a_start).sum(1) * (b * b_start).sum(0)
    return (own - 2 * cross).clamp_min(0).sqrt().to(a_CI.dtype)


def layer_kind(options: Adapter, kind: type[ComponentLinear]) -> type[ComponentLinear]:
    """The layer that goes with `adapter.init_weights` and `adapter.old`, where another would be of this kind."""
    if options.old == "magnitudes":
        return MagnitudeLinear
    return RelativeLinear if options.init_weights == "pissa" else kind.of(options)
