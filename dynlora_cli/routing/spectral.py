"""Scores of adapters for a token by the directions of their updates, from the products x Aᵀ that a layer makes anyway.

Let B A = U S Vᵀ be the update of one adapter in one layer, and h = A x what the layer has computed of a token x.

    Arrow     |v₁ · x|     how much the token lies along the direction that the update reads most
    SpectR    ‖S Vᵀ x‖     all directions, each by its size; it is ‖B A x‖, the size of what the update adds

Both are of h alone: S Vᵀ x = Uᵀ B h, a fixed matrix of components x components, and v₁ · x = u₁ᵀ B h / s₁. So a score
costs no second product with x, and adapters may have any ranks. They do not change when A is multiplied by a number
and B divided by it, or when the components are those of another basis.

An adapter that lacks a layer is no candidate there.

Dimensions: N tokens, I inputs, O outputs, K candidates of a layer, R components of a layer, all adapters together,
C components of one candidate, the most of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.multi import MultiLinear
from dynlora_cli.routing.router import Context

NO_RULE = (
    "nothing here tells when none of the adapters fits, so they speak on every request; "
    "the threshold of a calibrated library would tell"
)


@dataclass(frozen=True)
class Spectrum:
    """The candidates of one layer.

    Attributes:
        arrow_KR: v₁ · x is `arrow_KR @ h`.
        turn_KCC: S Vᵀ x is `turn_KCC @ h` of the candidate's own components.
        own_KC: numbers of these components; R where it has fewer than others.
        spread_KR: what a weight of a candidate is on each component.
        even: the layer has the candidates' components alone, and of each as many.
    """

    arrow_KR: Tensor
    turn_KCC: Tensor
    own_KC: Tensor
    spread_KR: Tensor
    even: bool

    def arrow(self, h_NR: Tensor) -> Tensor:
        """|v₁ · x| of each candidate. [N, K]"""
        return (h_NR @ self.arrow_KR.T).abs()

    def spectr(self, h_NR: Tensor) -> Tensor:
        """‖S Vᵀ x‖ of each candidate. [N, K]"""
        if self.even:
            own_NKC = h_NR.view(len(h_NR), *self.own_KC.shape)
        else:
            padded = torch.cat([h_NR, h_NR.new_zeros(len(h_NR), 1)], 1)
            own_NKC = padded.index_select(1, self.own_KC.flatten()).view(len(h_NR), *self.own_KC.shape)
        return torch.einsum("nkc,kdc->nkd", own_NKC, self.turn_KCC).norm(dim=2)


class SpectralGates:
    """Weighs adapters by their spectra, in every layer (TokenGates).

    Args:
        context: with a bank, and the names of the candidates.
        weigh: makes weights [N, K] of a layer's spectrum and its h [N, R].
        unit: tokens are scaled to length 1 before they are scored.
        general: adapters whose mean update is taken from every candidate's: GenKnowSub.
    """

    def __init__(
        self,
        context: Context,
        weigh: Callable[[Spectrum, Tensor], Tensor],
        *,
        unit: bool = False,
        general: Sequence[str] = (),
    ) -> None:
        assert context.bank is not None
        self.bank, self.weigh, self.unit, self.general = context.bank, weigh, unit, tuple(general)
        self.names = tuple(name for name in context.names if name not in general)
        self.notes = [] if context.must_choose else [NO_RULE]
        self._made: dict[str, tuple[tuple[Any, ...], Spectrum | None]] = {}
        for layer in self.bank.layers.values():
            self.spectrum(layer)

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """What each token takes of each component. [N, R]"""
        spectrum = self.spectrum(layer)
        if spectrum is None:
            return torch.zeros_like(h_NR)
        scored_NR = h_NR.float()
        if self.unit:
            scored_NR = scored_NR / x_NI.float().norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return self.weigh(spectrum, scored_NR) @ spectrum.spread_KR

    def spectrum(self, layer: MultiLinear) -> Spectrum | None:
        """Of a layer as it is now; None where no candidate adapts it."""
        tensors, there = (layer.a_RI, layer.b_OR), [self.bank.names[column] for column in layer.adapters]
        state, spectrum = self._made.get(layer.name, ((), None))
        if not state or state[0]() is not tensors[0] or state[1]() is not tensors[1] or state[2] != there:
            spectrum = self._of(layer)
            self._made[layer.name] = (*map(weakref.ref, tensors), there), spectrum
        return spectrum

    @torch.no_grad()
    def _of(self, layer: MultiLinear) -> Spectrum | None:
        part_of = {self.bank.names[n]: part for n, part in zip(layer.adapters, layer.slices, strict=True)}
        ranks = len(layer.a_RI)
        number_R = torch.arange(ranks, device=layer.a_RI.device)
        taken = [number_R[part_of[name]] for name in self.general if name in part_of]
        rows = []
        for name in self.names:
            if name in part_of:
                weight_R = torch.zeros(ranks, dtype=torch.float64, device=layer.a_RI.device)
                weight_R[part_of[name]] = 1.0
                for general in taken:
                    weight_R[general] = -1 / len(self.general)
                rows.append((torch.cat([number_R[part_of[name]], *taken]), weight_R))
        return _spectrum(layer.a_RI.double(), layer.b_OR.double(), rows) if rows else None


def top_k_softmax(score_NK: Tensor, top_k: int, temperature: float) -> Tensor:
    """Softmax over the k highest scores of each token, 0 for the others. [N, K]"""
    # Below the best, and chosen before they are divided: so no temperature makes infinity or equal scores of them.
    below_NK = (score_NK - score_NK.amax(1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    return below_NK.masked_fill(only_top_k(score_NK, top_k).isneginf(), -torch.inf).softmax(1)


def only_top_k(score_NK: Tensor, top_k: int) -> Tensor:
    """The k highest scores of each token, -inf for the others. [N, K]"""
    top = score_NK.topk(min(top_k, score_NK.shape[1]), 1)
    return torch.full_like(score_NK, -torch.inf).scatter(1, top.indices, top.values)


def _spectrum(a_RI: Tensor, b_OR: Tensor, rows: Sequence[tuple[Tensor, Tensor]]) -> Spectrum:
    """Of the update that each row of components and their weights stands for; in fp64, kept in fp32."""
    ranks, most = len(a_RI), max(len(own) for own, _ in rows)
    arrow_KR = a_RI.new_zeros(len(rows), ranks)
    turn_KCC = a_RI.new_zeros(len(rows), most, most)
    own_KC = torch.full((len(rows), most), ranks, device=a_RI.device)
    for row, (own_C, weight_R) in enumerate(rows):
        turn_DC, size_D = _turned(a_RI[own_C], b_OR[:, own_C] * weight_R[own_C])
        turn_KCC[row, : len(turn_DC), : len(own_C)] = turn_DC
        own_KC[row, : len(own_C)] = own_C
        if len(size_D) and size_D[0] > 0:  # an update of zeros reads nothing
            arrow_KR[row, own_C] = turn_DC[0] / size_D[0]
    spread_KR = torch.stack([weight_R for _, weight_R in rows])
    even = own_KC.flatten().tolist() == list(range(ranks))
    return Spectrum(arrow_KR.float(), turn_KCC.float(), own_KC, spread_KR.float(), even)


def _turned(a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor]:
    """Uᵀ B [D, C] and S [D] of B A = U S Vᵀ, from the thin factors: B = Q R, and Uᵀ B is that of the core times R."""
    _, r_a = torch.linalg.qr(a_CI.T)
    _, r_b = torch.linalg.qr(b_OC)
    u, size_D, _ = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return u.T @ r_b, size_D
