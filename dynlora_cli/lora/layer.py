"""Rank-1 components: a LoRA update written as a sum. lora/pool.py holds those of all layers together.

W' = W + s · Σ_i b_i a_iᵀ          i runs over the components that are alive in the layer

Dimensions, as suffixes of names:
    C  components of one layer          I  inputs of the layer (d_in)
    K  components of the pool           O  outputs of the layer (d_out)
    P  numbers of the pool: Σ over components of d_in + d_out
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.kernels.fused_lora import fused
from dynlora_cli.models.linear import forget_input, fusable, linear_shape, weight_type

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter


class Graph:
    """A token that lives exactly as long as one autograd graph through a layer; see `ComponentLinear.watched`."""

    __slots__ = ("__weakref__",)


class ComponentLinear(nn.Module):
    """A frozen linear layer plus the sum of its rank-1 components.

    Holds the base layer instead of becoming it, so the same class serves `nn.Linear`, GPT-2's transposed `Conv1D` and
    quantized layers. Without components it costs what the base costs.

    Args:
        base: the frozen layer; maps [..., I] to [..., O].
        scale: s, constant for the whole run.
        dropout: probability of dropping an input of the update while training.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3, as a sum over the rank.
    """

    a_CI: nn.Parameter
    b_OC: nn.Parameter
    fuse: bool = True  # False: ordinary operations instead of kernels/fused_lora.py, for comparisons
    turns: ClassVar[bool] = True  # the update depends on BA alone, so the gauge may turn A and B into another basis
    plain: ClassVar[bool] = True  # `factors` returns the leaves themselves, not something computed from them
    terms: ClassVar[int] = 1  # products b aᵀ of one component; `factors` gives all first ones, then all second ones

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = linear_shape(base)
        self.scale = scale
        self.dropout = dropout
        # The component gate: a factor for each component, [C] or broadcastable to [..., C]. None: no multiplication.
        self.gate: Tensor | None = None
        self.off = False  # answers as the base alone, see `switched_off`
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()  # the pool's; see `watched`
        self.low: tuple[Tensor, Tensor] | None = None  # a_CI and b_OC cast to autocast's dtype, see Pool.cast_with
        # Called for the output where layers with the same input compute together, see lora/shared_inputs.py.
        self.shared: Callable[[ComponentLinear, Tensor], Tensor | None] | None = None
        self.a_width, self.b_width = self.widths(self.in_features, self.out_features)
        self.a_CI = nn.Parameter(torch.empty(0, self.a_width))
        self.b_OC = nn.Parameter(torch.empty(self.b_width, 0))
        # The components that are left, by their index at the start. [C]
        self.survivors_C = torch.empty(0, dtype=torch.long)
        # At the start: components by birth, the run's own last; (): all are its own. See `born`.
        self.born_at_start: tuple[int, ...] = ()

    # -- what a variant may change; see lora/variant.py ----------------------------------------------------------------

    @classmethod
    def of(cls, options: Adapter) -> type[ComponentLinear]:  # noqa: ARG003
        """The class that a recipe's section `adapter` asks for, where a variant has several."""
        return cls

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        """Numbers of one component in a_CI and in b_OC."""
        return d_in, d_out

    @staticmethod
    def most(d_in: int, d_out: int) -> int:
        """The largest number of components that a layer may start with."""
        return max(1, min(d_in, d_out) // 2)

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:  # noqa: ARG002 - zero already
        """Write the initial values into the leaves: A kaiming_uniform (a = √5), B zero, as PEFT does."""
        bound = 1 / math.sqrt(self.in_features)
        a_CI.uniform_(-bound, bound, generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """a_CI [C, I] and b_OC [O, C] of the update s·BA, computed from the leaves."""
        return self.a_CI, self.b_OC

    def update(self, x: Tensor, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """What the components add to the base's output. [..., O]"""
        h_C = F.linear(x, a_CI) * self.scale
        if self.gate is not None:
            h_C = h_C * torch.cat([self.gate] * self.terms, -1)
        return F.linear(h_C, b_OC)

    def finished(self, y: Tensor) -> Tensor:
        """The layer's output, from the sum of the base's and the update's. [..., O]"""
        return y

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """The gradient of the loss for the layer's component gates, see `Pool.gate_gradient_K`. [C]"""
        assert self.a_CI.grad is not None
        assert self.b_OC.grad is not None
        if not self.a_CI.requires_grad:
            return (b_OC * self.b_OC.grad).sum(0)
        return (a_CI * self.a_CI.grad).sum(1)

    def mean_parts_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """One number per component from a value per weight: the mean over its row of a plus that over its column of b.

        Args:
            a_CI, b_OC: shaped as the leaves, such as an importance of every weight.
        """
        return a_CI.sum(1) / max(1, a_CI.shape[1]) + b_OC.sum(0) / max(1, b_OC.shape[0])

    def magnitudes_C(self) -> Tensor:
        """s·‖b_i‖·‖a_i‖ of every component, the Frobenius norm of its share of ΔW."""
        a_CI, b_OC = self.factors()
        return self.scale * a_CI.norm(dim=1) * b_OC.norm(dim=0)

    def ranked(self, scores_C: Tensor) -> Tensor:
        """The scores by which this layer's components compete, from those of a policy. [C]"""
        return scores_C

    def mark_held(self, a_CI: Tensor, b_OC: Tensor) -> None:
        """Mark the numbers that do not train where old components are held.

        Args:
            a_CI, b_OC: shaped as the leaves, boolean; false all over.
        """
        a_CI[: self.old], b_OC[:, : self.old] = True, True

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (from 1)."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of an optimizer step, or None."""
        return None

    def settle_gradient(self) -> None:
        """Called when the gradient of an optimizer step is complete, before it is clipped."""

    def after_update(self, rate: float) -> None:
        """Called after every optimizer step, with its learning rate."""

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Components alive in this layer (C)."""
        return self.a_CI.shape[0]

    @property
    def born(self) -> tuple[int, ...]:
        """Components alive by birth: so many of each run of the lineage, in this order; the last are the run's own."""
        if not self.born_at_start:
            return (self.count,)
        births = torch.tensor(self.born_at_start).cumsum(0)
        owner_C = torch.bucketize(self.survivors_C, births, right=True)
        return tuple(torch.bincount(owner_C, minlength=len(births)).tolist())

    @property
    def old(self) -> int:
        """Leading components that came from `adapter.from`; 0 where the run began with none."""
        return sum(self.born[:-1])

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for model code that looks at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, for model code that looks at it."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        if self.count == 0 or self.off:
            return forget_input(self.base, self.base(x))
        as_one = self.fusable(x)
        if as_one and self.shared and torch.is_grad_enabled():
            y = self.shared(self, x)
            if y is not None:
                return self.finished(y)
        low = self.low if torch.is_autocast_enabled(x.device.type) else None
        a_CI, b_OC = self._joined(low) or self.factors()
        if as_one:
            return self.finished(self.watched(fused(x, self.base, a_CI, b_OC, self.scale, low)))
        return self.beside(x, forget_input(self.base, self.base(x)), a_CI, b_OC)

    def beside(self, x: Tensor, y: Tensor, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """The layer's output [..., O] for x [..., I], where the base has answered y."""
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.a_CI.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_CI.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.finished(y + self.watched(self.update(x, a_CI, b_OC)).to(y.dtype))

    @staticmethod
    def _joined(low: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The cast copies of a and b, if this is compiled code and they pass gradients on to the pool."""
        if low is None or not torch.compiler.is_compiling():
            return None
        return low if low[1].requires_grad or not torch.is_grad_enabled() else None

    def fusable(self, x: Tensor) -> bool:
        """Whether base and components can run as one autograd function, see kernels/fused_lora.py."""
        if torch.compiler.is_compiling():  # torch.compile fuses ordinary operations itself
            return False
        if not self.fuse or self.gate is not None or (self.dropout and self.training) or not fusable(self.base):
            return False
        return torch.is_autocast_enabled(x.device.type) or x.dtype == weight_type(self.base) == self.a_CI.dtype

    def watched(self, result: Tensor) -> Tensor:
        """Register the autograd graph that produced this result, so that components are not removed while it lives.

        The token is attached to the autograd node and disappears with it; `Pool.graphs` holds only weak references.
        """
        if not torch.compiler.is_compiling() and result.grad_fn is not None:
            graph = Graph()
            result.grad_fn.metadata.setdefault("dynlora", []).append(graph)  # type: ignore[attr-defined]
            self.graphs.add(graph)
        return result

    def delta_OI(self) -> Tensor:
        """The update s·BA as a dense [O, I] matrix, in the components' precision."""
        a_CI, b_OC = self.factors()
        return self.scale * (b_OC @ a_CI).detach()

    def energy(self) -> float:
        """The Frobenius norm of s·BA, from the thin factors: ‖BA‖² = tr(BᵀB · AAᵀ)."""
        a, b = (factor.detach().double() for factor in self.factors())
        return self.scale * math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item()))


@contextmanager
def switched_off(layers: Iterable[ComponentLinear]) -> Iterator[None]:
    """Within the `with` block these layers answer as their base alone does; for passes without a gradient."""
    layers = list(layers)
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
