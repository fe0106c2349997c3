"""All components of all layers in one pool.

A layer computes with its own two leaves, `a_CI` and `b_OC`. Both are views of one flat tensor that belongs to the pool,
and so are their gradients:

    values_P    | a of layer 0 | a of layer 1 | ... | b of layer 0 | b of layer 1 | ... |

The optimizer steps the flat tensor, so clipping, all-reduce, checkpoints and the removal of components are each one
operation, whatever the number of layers. The leaves are separate because gradients of slices of one leaf would each
cost a tensor of full size.

Dimensions: C components of a layer, K of the pool, I inputs, O outputs, P numbers of the pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynlora_cli.errors import DynloraError
from dynlora_cli.lora.layer import ComponentLinear, Graph

if TYPE_CHECKING:
    from dynlora_cli.lora.shared_inputs import SharedInput


class CastInto(torch.autograd.Function):
    """`values.to(dtype)` in memory that is there already."""

    @staticmethod
    def forward(ctx: Any, values_P: Tensor, place: tuple[Tensor]) -> Tensor:
        ctx.dtype = values_P.dtype
        place[0].copy_(values_P)
        return place[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None]:
        return grad_P.to(ctx.dtype), None


class Pool:
    """All components of all layers, as views of one flat tensor.

    Args:
        layers: name to layer, in the model's order. They get their components here.
        counts: components of each layer at the start.
        seed: of the initial values, which the layers write.
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
        self.joined = False  # whether gradients reach the pool through the copies of `cast_with`; see there
        self.copies_stay = False  # whether those copies are in the same memory in every pass, as recordings need it
        self._copy_P: Tensor | None = None
        # Graphs through any of the layers that can still run backward; components cannot be removed meanwhile.
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.sharing: list[SharedInput] = []  # layers that compute together
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

        The optimizer is the caller's business: `surgery.shrink` swaps both together.

        Raises:
            DynloraError: an autograd graph through the old leaves is alive.
        """
        self.refuse_live_graphs()
        self._forget_copies()
        self._copy_P = None
        self.counts = dict(counts)
        self.values = nn.Parameter(values_P)
        self.values.grad = torch.zeros_like(values_P)
        views = zip(self.views(self.values.detach()), self.views(self.values.grad), strict=True)
        for layer, ((a, b), (a_grad, b_grad)) in zip(self.layers.values(), views, strict=True):
            layer.a_CI, layer.b_OC = nn.Parameter(a, requires_grad=not self.a_frozen), nn.Parameter(b)
            layer.a_CI.grad, layer.b_OC.grad = a_grad, b_grad

    @property
    def leaves(self) -> list[nn.Parameter]:
        """What the layers compute with, as views of the pool's values."""
        return [leaf for layer in self.layers.values() for leaf in (layer.a_CI, layer.b_OC)]

    def others(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains in a model besides its components."""
        leaves = set(map(id, self.leaves))
        return [
            parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in leaves
        ]

    def to(self, device: torch.device) -> Pool:
        """Move the components to a device; a base that is to be sharded is elsewhere at first."""
        if self.values.device.type != device.type:
            self.adopt(self.values.detach().to(device), self.counts)
        return self

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

        Compiled blocks (`joined`) give their gradients to the copies, which hand them on to the pool in one piece
        instead of one for each factor. They stay until the optimizer's step there: checkpointing needs them again.
        """

        def cast(*_: Any) -> None:
            kind = self.values.device.type
            if not torch.is_autocast_enabled(kind):
                self._forget_copies()
                return
            values = self.values if self.joined else self.values.detach()
            low = self.views(self._cast(values, torch.get_autocast_dtype(kind)))
            for layer, (a_CI, b_OC) in zip(self.layers.values(), low, strict=True):
                pair = (a_CI.detach() if self.a_frozen else a_CI, b_OC) if layer.plain else None
                layer.__dict__["low"] = pair  # a module's own way to be given an attribute takes ten times as long

        def end(*_: Any) -> None:
            if not self.joined:
                self._forget_copies()

        model.register_forward_pre_hook(cast)
        model.register_forward_hook(end, always_call=True)

    def _cast(self, values_P: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.copies_stay or not torch.is_grad_enabled():  # recordings are of training passes
            return values_P.to(dtype)
        if self._copy_P is None or self._copy_P.dtype != dtype:
            self._copy_P = torch.empty_like(values_P, dtype=dtype, requires_grad=False)
        return CastInto.apply(values_P, (self._copy_P,))

    def _forget_copies(self) -> None:
        for layer in self.layers.values():
            layer.__dict__["low"] = None

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
        layers = list(self.layers.values())
        if self.a_frozen or any(type(layer).gate_gradient_C is not ComponentLinear.gate_gradient_C for layer in layers):
            return torch.cat([layer.gate_gradient_C(layer.a_CI.detach(), layer.b_OC.detach()) for layer in layers])
        # The same of the flat tensors, for all neighbours of one width at once: on a GPU calls are what costs.
        runs = [
            (width, sum(self.counts[name] for name, _ in run))
            for width, run in groupby(self.layers.items(), lambda item: item[1].a_width)
        ]
        assert self.values.grad is not None
        size_a = sum(width * count for width, count in runs)
        products = (self.values.detach()[:size_a] * self.values.grad[:size_a]).split([w * count for w, count in runs])
        return torch.cat([part.view(count, w).sum(1) for part, (w, count) in zip(products, runs, strict=True)])

    @torch.no_grad()
    def magnitudes_K(self) -> Tensor:
        """The Frobenius norm of every component's share of ΔW. [K]"""
        return torch.cat([layer.magnitudes_C() for layer in self.layers.values()])

    def ranked(self, scores_K: Tensor) -> Tensor:
        """A policy's scores as the layers rank them. [K]"""
        parts = zip(self.layers.values(), scores_K.split(list(self.counts.values())), strict=True)
        return torch.cat([layer.ranked(scores_C) for layer, scores_C in parts])

    def begin_step(self, step: int, total_steps: int) -> None:
        """Tell every layer that optimizer step `step` (from 1) is next."""
        for layer in self.layers.values():
            layer.begin_step(step, total_steps)

    def settle_gradient(self) -> None:
        """Tell every layer that the gradient of an optimizer step is complete."""
        for layer in self.layers.values():
            layer.settle_gradient()

    def stand_after(self, step: int, total_steps: int) -> None:
        """Put the layers where optimizer step `step` left them, which no checkpoint says in full."""
        self.begin_step(step, total_steps)
        self.after_update(0.0)

    def after_update(self, rate: float) -> None:
        """Tell every layer that the optimizer has stepped at this learning rate."""
        self._forget_copies()
        for group in self.sharing:
            group.finish()
        for layer in self.layers.values():
            layer.after_update(rate)

    def penalty(self) -> Tensor | None:
        """What the layers add to the loss of an optimizer step."""
        parts = [part for layer in self.layers.values() if (part := layer.penalty()) is not None]
        return torch.stack(parts).sum() if parts else None

    def numbers_P(self, chosen_K: Tensor) -> Tensor:
        """Of which numbers these components consist. [P], boolean"""
        chosen_P = torch.zeros(self.parameters, dtype=torch.bool, device=self.values.device)
        per_layer = chosen_K.to(self.values.device).split(list(self.counts.values()))
        for (a, b), chosen_C in zip(self.views(chosen_P), per_layer, strict=True):
            a[chosen_C] = True
            b[:, chosen_C] = True
        return chosen_P

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
