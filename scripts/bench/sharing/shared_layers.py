"""Low-rank updates whose components several layers share, for many runs side by side on one frozen base.

Layers of one kind (all `q_proj`, all `up_proj`, ...) have the same shape. Where LoRA of rank r has r components in each of L
layers, a form has a pool for all of them together, and components of each layer's own:

    dW_l = s * B[:, columns_l] diag(g_l) A[rows_l]  +  s * B_l A_l

LoRA is the form without a pool. The runs of a form begin with the same numbers and differ in their rates.

Dimensions: N runs, K components of a pool, C of a layer, P its own ones, I inputs, O outputs, R rows, T tokens.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE = 2.0  # as LoRA has it in quality.py: alpha is twice the rank
SPREAD = 0.5  # gates start at 1 + SPREAD * N(0, 1): layers that begin alike stay alike
ALL = 1_000_000


@dataclass(frozen=True)
class Form:
    """How the components of one kind are divided among its layers.

    Attributes:
        private: of the r components of a layer, how many are its own; the others go into the pool.
        least: components of each layer that go into the pool in any case.
        drawn: components that a layer takes from its pool, in multiples of r; 0 for all of them.
        apart: A and B are drawn apart, so that a pair is one of K*K (as in MoS), not one of K.
        gates: a trained number per layer and component.
        gamma: both factors start from the first gradient, as in LoRA-One, divided by the root of this; 0: they do not.
    """

    private: int = 0
    least: int = 1
    drawn: int = 0
    apart: bool = False
    gates: bool = True
    gamma: float = 0.0

    def sizes(self, rank: int, layers: int) -> tuple[int, int, int]:
        """Components of a pool, drawn from it by a layer, and of a layer's own."""
        private = min(self.private, rank - self.least)
        pooled = (rank - private) * layers
        return pooled, min(pooled, self.drawn * rank) or pooled, private


FORMS = {
    "lora": Form(private=ALL, least=0, gates=False),
    "pool": Form(),  # everything in the pool
    "rasa": Form(private=ALL),  # RaSA with k = 1: one component of each layer in the pool, r - 1 its own
    "mos": Form(private=1, drawn=2, apart=True, gates=False),  # MoS: fixed random subsets, one of a layer's own
    "mos-gated": Form(private=1, drawn=2, apart=True),
    "pool-equal": Form(gates=False),  # the control: all layers get the same update
    "lora-one": Form(private=ALL, least=0, gates=False, gamma=128.0),
    "lora-one-g16": Form(private=ALL, least=0, gates=False, gamma=16.0),
}


class Runs:
    """The runs of one form: their parameters, first dimension N, and what each layer takes of them.

    Args:
        rates: one for each run.
        gradients: of the frozen weights, [O, I] by name; for forms with a `gamma`.
    """

    def __init__(
        self,
        form: Form,
        rank: int,
        rates: Sequence[float],
        targets: Mapping[str, nn.Module],
        seed: int,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.rates_N = torch.tensor(rates)
        self.parameters: list[Tensor] = []
        self.layers: dict[str, Taken] = {}
        self.pairs = 0
        draw, kinds = torch.Generator().manual_seed(seed), defaultdict(list)
        for name in targets:
            kinds[kind_of(name)].append(name)
        for names in kinds.values():
            outputs, inputs = targets[names[0]].weight.shape
            pooled, drawn, private = form.sizes(rank, len(names))
            pool = self.pair(pooled, inputs, outputs, draw)
            used = set()
            for name in names:
                rows = torch.randperm(pooled, generator=draw)[:drawn].sort().values
                columns = torch.randperm(pooled, generator=draw)[:drawn] if form.apart else rows
                gate = self.own(1 + SPREAD * torch.randn(drawn, generator=draw)) if form.gates and pooled else None
                own = self.pair(private, inputs, outputs, draw)
                whole = drawn == pooled and not form.apart
                self.layers[name] = Taken(pool, None if whole else rows, None if whole else columns, gate, own)
                used |= set(zip(rows.tolist(), columns.tolist(), strict=True))
                if form.gamma:
                    assert gradients is not None and own is not None  # noqa: PT018
                    start_from(gradients[name], *own, form.gamma)
            self.pairs += len(used) + private * len(names)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def own(self, values: Tensor) -> Tensor:
        """A parameter that begins with these values in every run."""
        parameter = values.expand(len(self.rates_N), *values.shape).clone().requires_grad_(True)
        self.parameters.append(parameter)
        return parameter

    def pair(self, components: int, inputs: int, outputs: int, draw: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """A [N, C, I] as PEFT starts it, uniform and as wide as a linear layer's weight, and B [N, O, C], zero."""
        if not components:
            return None
        a_CI = (2 * torch.rand(components, inputs, generator=draw) - 1) / math.sqrt(inputs)
        return self.own(a_CI), self.own(torch.zeros(outputs, components))

    def sizes(self, targets: Mapping[str, nn.Module]) -> dict[str, int]:
        """Numbers of one run.

        parameters: what is trained, and what a format of its own would hold (random subsets come from the seed).
        expanded: as plain LoRA, every layer with all that it uses.
        vera: as PEFT's VeRA, one A and one B for all layers and shapes, padded to the widest, a gate for every layer and
            component, and its second vector of O ones.
        """
        shapes = {name: module.weight.shape for name, module in targets.items()}
        widest = max(inputs for _, inputs in shapes.values()) + max(outputs for outputs, _ in shapes.values())
        expanded = sum(layer.width * sum(shapes[name]) for name, layer in self.layers.items())
        vera = self.pairs * (widest + len(shapes)) + sum(outputs for outputs, _ in shapes.values())
        return {"parameters": sum(p[0].numel() for p in self.parameters), "expanded": expanded, "vera": vera}

    @torch.no_grad()
    def step(self, number: int, share: float, weight_decay: float, max_norm: float) -> None:
        """AdamW with every run's own clipping and rate; the step `number` counts from 1."""
        used = [p for p in self.parameters if p.grad is not None]
        squares_N = torch.stack([p.grad.flatten(1).square().sum(1) for p in used]).sum(0)
        clip_N = (max_norm / (squares_N.sqrt() + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(squares_N)
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            each = (-1,) + (1,) * (parameter.ndim - 1)
            gradient = parameter.grad * clip_N.view(each)
            rate = (self.rates_N * share).view(each)
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = (second / (1 - 0.999**number)).sqrt_().add_(1e-8)
            parameter.mul_(1 - rate * weight_decay).sub_(rate * first / (1 - 0.9**number) / size)
            parameter.grad = None


@dataclass
class Taken:
    """What one layer takes of the parameters of a form."""

    pool: tuple[Tensor, Tensor] | None
    rows_C: Tensor | None
    columns_C: Tensor | None
    gate_NC: Tensor | None
    own: tuple[Tensor, Tensor] | None

    @property
    def width(self) -> int:
        return self.plain()[0].shape[1]

    def plain(self) -> tuple[Tensor, Tensor]:
        """The update as plain LoRA: A [N, C, I] with the gates in it, and B [N, O, C]; SCALE is alpha / r."""
        parts = []
        if self.pool is not None:
            a_NCI, b_NOC = self.pool
            if self.rows_C is not None and self.columns_C is not None:
                a_NCI, b_NOC = a_NCI[:, self.rows_C], b_NOC[:, :, self.columns_C]
            parts.append((a_NCI if self.gate_NC is None else a_NCI * self.gate_NC[:, :, None], b_NOC))
        if self.own is not None:
            parts.append(self.own)
        if len(parts) == 1:
            return parts[0]
        return torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts], 2)


class SideBySide(nn.Module):
    """A frozen linear layer with the updates of several forms: the first rows of a batch are the first run's, and so on."""

    def __init__(self, base: nn.Module, taken: Sequence[Taken]) -> None:
        super().__init__()
        self.base = base
        self.taken = taken

    def forward(self, x_RTI: Tensor) -> Tensor:
        plain = [taken.plain() for taken in self.taken]
        width = max(a_NCI.shape[1] for a_NCI, _ in plain)
        a_NCI = torch.cat([functional.pad(a, (0, 0, 0, width - a.shape[1])) for a, _ in plain])
        b_NOC = torch.cat([functional.pad(b, (0, width - b.shape[2])) for _, b in plain])
        y_RTO = self.base(x_RTI)
        x_N = x_RTI.reshape(len(a_NCI), -1, x_RTI.shape[-1])
        return y_RTO + SCALE * ((x_N @ a_NCI.mT) @ b_NOC.mT).view_as(y_RTO)


def start_from(gradient_OI: Tensor, a_NCI: Tensor, b_NOC: Tensor, gamma: float) -> None:
    """LoRA-One's start (arXiv 2502.01235, without its preconditioner): both factors from the first full gradient.

    With -G = U S V^T: B = U sqrt(S / S_1) / sqrt(gamma), A = sqrt(S / S_1) V^T / sqrt(gamma), of the first C triplets. The
    base stays as it is, as in the paper, so that the model begins one low-rank step of gradient descent further on.
    """
    u_OR, s_R, v_RI = torch.linalg.svd(-gradient_OI, full_matrices=False)
    count = a_NCI.shape[1]
    share_C = (s_R[:count] / s_R[0] / gamma).sqrt()
    with torch.no_grad():
        b_NOC.copy_(u_OR[:, :count] * share_C)
        a_NCI.copy_(share_C[:, None] * v_RI[:count])


def kind_of(name: str) -> str:
    """`model.layers.*.mlp.up_proj` of `model.layers.3.mlp.up_proj`."""
    return re.sub(r"\.\d+\.", ".*.", name)


def attach(model: Any, targets: Mapping[str, nn.Module], runs: Sequence[Runs]) -> None:
    """Put all runs on the targets, everything else frozen."""
    model.requires_grad_(False)
    for name, module in targets.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, SideBySide(module, [each.layers[name] for each in runs]))
