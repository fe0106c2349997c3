"""Rank-1 components: a LoRA update written as a sum, and all components of all layers in one pool.

    W' = W + s · Σ_i b_i a_iᵀ          i runs over the components that are alive in the layer

    Dimensions, as suffixes of names:
        C  components of one layer          I  inputs of the layer (d_in)
        K  components of the pool           O  outputs of the layer (d_out)
        P  numbers of the pool: Σ over components of d_in + d_out

A layer computes with its own two leaves, `a_CI` and `b_OC`. Both are views of one flat tensor that belongs to the pool,
and so are their gradients:

    values_P    | a of layer 0 | a of layer 1 | ... | b of layer 0 | b of layer 1 | ... |

The optimizer steps the flat tensor, so clipping, all-reduce, checkpoints and the removal of components are each one
operation, whatever the number of layers. The leaves are separate because gradients of slices of one leaf would each
cost a tensor of full size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.errors import DynloraError
from dynlora_cli.fused_linear import fusable, fused, weight_type


class _Graph:
    """Lives as long as one autograd graph that runs through a layer; see `Pool.graphs`."""

    __slots__ = ("__weakref__",)


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: `nn.Linear` and its quantized kin, or GPT-2's Conv1D, whose weight is [I, O]."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features  # type: ignore[return-value]
    d_in, d_out = base.weight.shape  # type: ignore[misc]
    return d_in, d_out


def dense_weight(module: nn.Module) -> Tensor:
    """A layer's weight as [O, I] in fp32, dequantized where it is stored in 4 or 8 bits."""
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if hasattr(weight, "SCB"):
        state: Any = module.state
        scb = weight.SCB if weight.SCB is not None else state.SCB
        return weight.data.float() * (scb.view(-1, 1).float() / 127)
    weight = weight.detach().float()
    return weight.T if type(module).__name__ == "Conv1D" else weight


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
    fuse: ClassVar[bool] = True  # False: ordinary operations throughout, to compare with
    turns: ClassVar[bool] = True  # the update depends on BA alone, so that components may be turned into another basis
    plain: ClassVar[bool] = True  # the leaves are the factors themselves

    def __init__(self, base: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = linear_shape(base)
        self.scale = scale
        self.dropout = dropout
        # One factor per component, [C] or broadcastable to [..., C], for a single request; None costs nothing.
        self.gate: Tensor | None = None
        self.graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.low: tuple[Tensor, Tensor] | None = None  # a and b in autocast's type, during a forward pass of the model
        self.a_width, self.b_width = self.widths(self.in_features, self.out_features)
        self.a_CI = nn.Parameter(torch.empty(0, self.a_width))
        self.b_OC = nn.Parameter(torch.empty(self.b_width, 0))
        # Which of the components that the layer began with are left. [C]
        self.survivors_C = torch.empty(0, dtype=torch.long)

    # -- what a variant may change; see variants/_variant.py -----------------------------------------------------------

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:
        """Numbers of one component in a_CI and in b_OC."""
        return d_in, d_out

    @staticmethod
    def most(d_in: int, d_out: int) -> int:
        """Components that a layer may begin with."""
        return max(1, min(d_in, d_out) // 2)

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:  # noqa: ARG002 - zero already
        """Write the initial values into the leaves: A kaiming_uniform (a = √5), B zero, as PEFT."""
        bound = 1 / math.sqrt(self.in_features)
        a_CI.uniform_(-bound, bound, generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """a_CI [C, I] and b_OC [O, C] of the update s·BA, from the leaves."""
        return self.a_CI, self.b_OC

    def gate_gradient_C(self, a_CI: Tensor, b_OC: Tensor) -> Tensor:
        """dL/dg of the layer's components from the leaves' gradients: <a_i, dL/da_i> = <b_i, dL/db_i>."""
        assert self.a_CI.grad is not None
        assert self.b_OC.grad is not None
        if not self.a_CI.requires_grad:
            return (b_OC * self.b_OC.grad).sum(0)
        return (a_CI * self.a_CI.grad).sum(1)

    def ranked(self, scores_C: Tensor) -> Tensor:
        """Scores by which components may go, from a policy's."""
        return scores_C

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (from 1)."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of an optimizer step."""
        return None

    def after_update(self, rate: float) -> None:
        """Called after every optimizer step, with its learning rate."""

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Components alive in this layer (C)."""
        return self.a_CI.shape[0]

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
        if self.count == 0:
            return self.base(x)
        a_CI, b_OC = self.factors()
        if self._fusable(x):
            return self._watched(fused(x, self.base, a_CI, b_OC, self.scale, self.low))
        y = self.base(x)
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.a_CI.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_CI.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h_C = F.linear(x, a_CI) * self.scale
        if self.gate is not None:
            h_C = h_C * self.gate
        update = self._watched(F.linear(h_C, b_OC))
        return y + update.to(y.dtype)

    def _fusable(self, x: Tensor) -> bool:
        """Whether base and components can run as one function."""
        if torch.compiler.is_compiling():  # torch.compile fuses ordinary operations itself
            return False
        if not self.fuse or self.gate is not None or (self.dropout and self.training) or not fusable(self.base):
            return False
        return torch.is_autocast_enabled(x.device.type) or x.dtype == weight_type(self.base) == self.a_CI.dtype

    def _watched(self, result: Tensor) -> Tensor:
        """Note the graph that ends here, so that components are not removed while it lives."""
        if not torch.compiler.is_compiling() and result.grad_fn is not None:
            graph = _Graph()
            result.grad_fn.metadata["dynlora"] = graph  # type: ignore[index]
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


class Pool:
    """All components of all layers, as views of one flat tensor.

    Args:
        layers: name to layer, in the model's order. They get their components here.
        counts: components of each layer at the start.
        seed: of the initial values: B = 0, A uniform on ±1/√d_in (kaiming_uniform with a = √5, as PEFT).
        device: where the components live.
    """

    def __init__(
        self,
        layers: Mapping[str, ComponentLinear],
        counts: Mapping[str, int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = dict(layers)
        self.a_frozen = False
        # Graphs through any of the layers that can still run backward; components cannot be removed meanwhile.
        self.graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        for layer in self.layers.values():
            layer.graphs = self.graphs
        values = torch.zeros(sum(counts[name] * self.cost(name) for name in self.layers))
        self.counts = {name: counts[name] for name in self.layers}
        generator = torch.Generator().manual_seed(seed)
        for layer, (a_CI, b_OC) in zip(self.layers.values(), self.views(values), strict=True):
            layer.start(a_CI, b_OC, generator)
        self.survive([torch.arange(count) for count in self.counts.values()])
        self.adopt(values.to(device), self.counts)

    def cost(self, name: str) -> int:
        """Numbers that one component of this layer holds: d_in + d_out in LoRA."""
        return self.layers[name].a_width + self.layers[name].b_width

    @property
    def parameters(self) -> int:
        """Numbers in all components that are alive (P)."""
        return self.values.numel()

    @property
    def components(self) -> int:
        """Components that are alive (K)."""
        return sum(self.counts.values())

    def views(self, flat_P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(a_CI, b_OC) of every layer, in order, as views of a flat tensor of this pool: values, gradient, moments."""
        sizes_a = [self.counts[name] * layer.a_width for name, layer in self.layers.items()]
        sizes_b = [self.counts[name] * layer.b_width for name, layer in self.layers.items()]
        parts = flat_P.split(sizes_a + sizes_b)
        return [
            (a.view(self.counts[name], layer.a_width), b.view(layer.b_width, self.counts[name]))
            for (name, layer), a, b in zip(
                self.layers.items(), parts[: len(sizes_a)], parts[len(sizes_a) :], strict=True
            )
        ]

    def adopt(self, values_P: Tensor, counts: Mapping[str, int]) -> None:
        """Make `values_P` the pool's numbers, with fresh leaves and zero gradients in every layer.

        The optimizer is the caller's business: `rank.shrink` swaps both together.

        Raises:
            DynloraError: an autograd graph through the old leaves is alive.
        """
        self.refuse_live_graphs()
        self.counts = dict(counts)
        self.values = nn.Parameter(values_P)
        self.values.grad = torch.zeros_like(values_P)
        views = zip(self.views(self.values.detach()), self.views(self.values.grad), strict=True)
        for layer, ((a, b), (a_grad, b_grad)) in zip(self.layers.values(), views, strict=True):
            layer.a_CI, layer.b_OC = nn.Parameter(a, requires_grad=not self.a_frozen), nn.Parameter(b)
            layer.a_CI.grad, layer.b_OC.grad = a_grad, b_grad

    def freeze_a(self) -> None:
        """Train B alone from now on: no A gets a gradient, and no layer keeps its input for one.

        A is still turned by the gauge and pruned. It keeps its place in the flat tensors, where its gradient and its
        moments are zero: what is saved is activations.

        Source: LoRA-FA, arXiv 2308.03303.
        """
        self.a_frozen = True
        for layer in self.layers.values():
            layer.a_CI.requires_grad_(False)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The numbers of all A and those of all B, as views of the pool's values."""
        size_a = sum(self.counts[name] * layer.a_width for name, layer in self.layers.items())
        values = self.values.detach()
        return values[:size_a], values[size_a:]

    def cast_with(self, model: nn.Module) -> None:
        """From now on cast all components at once when a forward pass of this model begins, not layer by layer.

        Only where autocast is on. When the pass ends the copies are forgotten, so that none can be out of date.
        """

        def cast(*_: Any) -> None:
            kind = self.values.device.type
            if torch.is_autocast_enabled(kind):
                low = self.views(self.values.detach().to(torch.get_autocast_dtype(kind)))
                for layer, pair in zip(self.layers.values(), low, strict=True):
                    layer.low = pair if layer.plain else None

        def forget(*_: Any) -> None:
            for layer in self.layers.values():
                layer.low = None

        model.register_forward_pre_hook(cast)
        model.register_forward_hook(forget, always_call=True)

    def refuse_live_graphs(self) -> None:
        """Raise where a forward pass is still waiting for its backward (or its loss is still held)."""
        if self.graphs:
            raise DynloraError(
                "components cannot change while an autograd graph through them is alive: "
                "its backward would train tensors that no longer exist",
                "run backward and drop the loss first",
            )

    @contextmanager
    def masked(self, keep_K: Tensor) -> Iterator[None]:
        """Inside the block the model computes as if only these components were there; for measuring."""
        per_layer = keep_K.to(self.values).split(list(self.counts.values()))
        for layer, keep_C in zip(self.layers.values(), per_layer, strict=True):
            layer.gate = keep_C
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.gate = None

    def gate_gradient_K(self) -> Tensor:
        """dL/dg_i of every component, from the gradient at hand: <a_i, dL/da_i>. [K]

        With W' = W + s Σ g_i b_i a_iᵀ at g = 1, the gate's gradient equals <a_i, dL/da_i> = <b_i, dL/db_i>.
        """
        return torch.cat(
            [layer.gate_gradient_C(layer.a_CI.detach(), layer.b_OC.detach()) for layer in self.layers.values()]
        )

    @torch.no_grad()
    def magnitudes_K(self) -> Tensor:
        """s·‖b_i‖·‖a_i‖ of every component, the Frobenius norm of its share of ΔW. [K]"""
        pairs = [(layer.scale, *layer.factors()) for layer in self.layers.values()]
        return torch.cat([scale * a.norm(dim=1) * b.norm(dim=0) for scale, a, b in pairs])

    def ranked(self, scores_K: Tensor) -> Tensor:
        """A policy's scores as the layers rank them. [K]"""
        parts = zip(self.layers.values(), scores_K.split(list(self.counts.values())), strict=True)
        return torch.cat([layer.ranked(scores_C) for layer, scores_C in parts])

    def begin_step(self, step: int, total_steps: int) -> None:
        """Tell every layer that optimizer step `step` (from 1) is next."""
        for layer in self.layers.values():
            layer.begin_step(step, total_steps)

    def after_update(self, rate: float) -> None:
        """Tell every layer that the optimizer has stepped at this learning rate."""
        for layer in self.layers.values():
            layer.after_update(rate)

    def penalty(self) -> Tensor | None:
        """What the layers add to the loss of an optimizer step."""
        parts = [part for layer in self.layers.values() if (part := layer.penalty()) is not None]
        return torch.stack(parts).sum() if parts else None

    def survive(self, survivors: Sequence[Tensor]) -> None:
        """Note for every layer which of its first components are left."""
        for layer, survivors_C in zip(self.layers.values(), survivors, strict=True):
            layer.survivors_C = survivors_C

    def costs_K(self) -> Tensor:
        """Numbers of every component. [K], int64"""
        return self._per_component([self.cost(name) for name in self.layers])

    def layers_K(self) -> Tensor:
        """Index of every component's layer. [K], int64"""
        return self._per_component(list(range(len(self.layers))))

    def _per_component(self, per_layer: list[int]) -> Tensor:
        device = self.values.device
        counts = torch.tensor(list(self.counts.values()), device=device)
        return torch.tensor(per_layer, device=device).repeat_interleave(counts)
