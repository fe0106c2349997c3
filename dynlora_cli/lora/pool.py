"""All components of all layers in one pool.

A layer computes with its own two leaves, `a_CI` and `b_OC`. Both are views of one flat tensor that belongs to the pool,
and so are their gradients:

    values_P    | a of layer 0 | a of layer 1 | ... | b of layer 0 | b of layer 1 | ... |

The optimizer steps the flat tensor, so clipping, all-reduce, checkpoints and the removal of components are each one
operation, whatever the number of layers. Why does every layer have leaves of its own then, instead of slices of one
leaf? Because autograd would give each slice a gradient as large as the whole flat tensor.

The price: autograd knows nothing of the flat tensor. Whoever replaces it (a pruning event, a move to another device)
must replace all leaves with it, which is what `adopt` does, and no autograd graph through the old leaves may be alive.

Dimensions: C components of a layer, K of the pool, I inputs, O outputs, P numbers of the pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dynlora_cli.errors import DynloraError
from dynlora_cli.lora.cast_into import CastInto
from dynlora_cli.lora.layer import ComponentLinear, Graph, switched_off
from dynlora_cli.lora.orthogonality import overlap_penalty

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.shared_inputs import SharedInput


class Pool:
    """All components of all layers, as views of one flat tensor.

    Args:
        layers: name to layer, in the model's order. They get their components here.
        counts: components of each layer at the start.
        seed: for the random initial values, which the layers write.
        device: where the components live.

    Attributes:
        values: the flat tensor [P], a parameter for the optimizer to step; its `.grad` is the flat gradient.
        counts: components alive in each layer, by name.
        a_frozen: no A trains (LoRA-FA).
        holds_old: components that came from `adapter.from` do not train; see `held_P`.
        joined: compiled blocks train the cast copies instead of the leaves; see `cast_with`.
        copies_stay: the cast copies keep their memory address from pass to pass, for CUDA graphs.
        orthogonality: weight of the penalty on overlap of old and new components; see lora/orthogonality.py.
        sharing: groups of layers that compute together; see lora/shared_inputs.py.
        gradients_stay: gradients are zeroed in place between steps, never dropped: all are views of one tensor.
    """

    gradients_stay: ClassVar[bool] = True

    def __init__(
        self,
        layers: Mapping[str, ComponentLinear],
        counts: Mapping[str, int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = dict(layers)
        self.a_frozen = self.holds_old = False
        self._held_P: Tensor | None = None
        self.orthogonality = 0.0
        self.joined = False
        self.copies_stay = False
        self._copy_P: Tensor | None = None
        # One entry for each live autograd graph through a layer; while there are any, components cannot be removed.
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.sharing: list[SharedInput] = []
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
        """Numbers stored in one component of this layer: d_in + d_out in LoRA."""
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
        """Cut a flat tensor of this pool [P] (values, gradient or moments) into (a_CI, b_OC) of every layer: views."""
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

        The optimizer still holds the old tensor afterwards; `surgery.shrink` replaces both together.

        Args:
            values_P: becomes the memory of `values`, without a copy.
            counts: components of each layer in it.

        Raises:
            DynloraError: an autograd graph through the old leaves is alive.
        """
        self.refuse_live_graphs()
        self.forget_copies()
        self._copy_P = self._held_P = None
        self.counts = dict(counts)
        self.values = nn.Parameter(values_P)
        self.values.grad = torch.zeros_like(values_P)
        views = zip(self.views(self.values.detach()), self.views(self.values.grad), strict=True)
        for layer, ((a, b), (a_grad, b_grad)) in zip(self.layers.values(), views, strict=True):
            layer.a_CI, layer.b_OC = nn.Parameter(a, requires_grad=not self.a_frozen), nn.Parameter(b)
            layer.a_CI.grad, layer.b_OC.grad = a_grad, b_grad

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The factors a_CI and b_OC of all layers: parameters that are views of the pool's values."""
        return [leaf for layer in self.layers.values() for leaf in (layer.a_CI, layer.b_OC)]

    def others(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's trainable parameters besides its components, such as a new classification head."""
        leaves = set(map(id, self.leaves))
        return [
            parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in leaves
        ]

    # -- what training asks of whatever it trains, a pool or a whole model ---------------------------------------------

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: the components, then whatever else of the model trains.

        The learning rate of a group that is `coupled` follows the number of parameters that are alive.
        """
        others = self.others(model)
        rest = [{"params": others, "coupled": False}] if others else []
        return [{"params": [self.values], "coupled": True}, *rest]

    def see(self, batch: Batch) -> None:
        """Components look at no batch."""

    def switched_off(self) -> AbstractContextManager[None]:
        return switched_off(self.layers.values())

    def alive(self) -> dict[str, int]:
        """How many components and numbers there are now, for metrics and events."""
        return {"components": self.components, "parameters": self.parameters}

    @contextmanager
    def rates_of_a_and_b(self, b_rate: float) -> Iterator[None]:
        """Give A and B rates of their own for the optimizer's step inside the block: B `b_rate` times that of A.

        A and B are one tensor with one rate, so the step is scaled afterwards. That is the same, as a step of AdamW is
        proportional to the learning rate, weight decay included. A frozen A is put back, and so are the numbers of
        `held_P`: they have no gradient, but weight decay would move them.

        Source: LoRA+, arXiv 2402.12354, which gives B the higher rate.
        """
        held_P = self.held_P
        all_before = None if held_P is None else self.values.detach().clone()
        rates = 0.0 if self.a_frozen else 1.0, b_rate
        changed = [(half, half.clone(), rate) for half, rate in zip(self.halves(), rates, strict=True) if rate != 1]
        yield
        for half, before, rate in changed:
            half.copy_(before.lerp(half, rate))
        if held_P is not None and all_before is not None:
            values = self.values.detach()
            values.copy_(torch.where(held_P, all_before, values))

    def let_go(self) -> bool:
        """Set the gradient of the numbers in `held_P` to zero; whether there are any."""
        held_P = self.held_P
        if held_P is not None:
            assert self.values.grad is not None
            self.values.grad.masked_fill_(held_P, 0.0)
        return held_P is not None

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the gradients to zero in place: those of all layers are views of one tensor."""
        optimizer.zero_grad(set_to_none=False)

    # ------------------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> Pool:
        """Move the components to a device, for runs whose base was loaded on the CPU to be sharded."""
        if self.values.device.type != device.type:
            self.adopt(self.values.detach().to(device), self.counts)
        return self

    def freeze_a(self) -> None:
        """Train B alone from now on: A gets no gradient, so no layer needs to keep its input for the backward pass.

        This saves activations, not optimizer state: A keeps its place in the flat tensors, with zero gradient and
        moments, because the gauge still turns A and events still prune it.

        Source: LoRA-FA, arXiv 2308.03303.
        """
        self.a_frozen = True
        for layer in self.layers.values():
            layer.a_CI.requires_grad_(False)

    @property
    def held_P(self) -> Tensor | None:
        """The pool's numbers that do not train, boolean; None where all do.

        They are in every pass and get a gradient, by which they are scored and pruned like the others. After that their
        gradient is set to zero, so that it is neither clipped nor stepped: see `let_go`.
        """
        if self.holds_old and self._held_P is None:
            self._held_P = torch.zeros(self.parameters, dtype=torch.bool, device=self.values.device)
            for layer, (a_CI, b_OC) in zip(self.layers.values(), self.views(self._held_P), strict=True):
                layer.mark_held(a_CI, b_OC)
        return self._held_P

    def halves(self) -> tuple[Tensor, Tensor]:
        """All A as one flat tensor and all B as another: views of the pool's values."""
        size_a = sum(self.counts[name] * layer.a_width for name, layer in self.layers.items())
        values = self.values.detach()
        return values[:size_a], values[size_a:]

    def cast_with(self, model: nn.Module) -> None:
        """Install the cast cache: at the start of each forward pass of `model`, cast all components in one operation.

        Without it autocast would cast every factor of every layer on its own. The copies are in `layer.low` during the
        pass and dropped at its end, so that none is used after the values have changed. Without autocast nothing
        happens.

        For compiled blocks (`joined`) the copies are part of the autograd graph: gradients flow from the copies into
        `values` in one cast, instead of one for each factor. Those copies are kept until the optimizer's step, because
        with gradient checkpointing the backward pass runs the blocks again.
        """

        begins = model.register_forward_pre_hook(lambda *_: self.cast_copies())
        ends = model.register_forward_hook(lambda *_: None if self.joined else self.forget_copies(), always_call=True)
        self.hooks = begins, ends

    def cast_copies(self) -> None:
        """Fill the cast cache for the pass that is next; whoever calls it empties it again."""
        kind = self.values.device.type
        if not torch.is_autocast_enabled(kind):
            self.forget_copies()
            return
        values = self.values if self.joined else self.values.detach()
        low = self.views(self._cast(values, torch.get_autocast_dtype(kind)))
        for layer, (a_CI, b_OC) in zip(self.layers.values(), low, strict=True):
            pair = (a_CI.detach() if self.a_frozen else a_CI, b_OC) if layer.plain else None
            layer.__dict__["low"] = pair  # past nn.Module.__setattr__, which takes ten times as long

    def _cast(self, values_P: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.copies_stay or not torch.is_grad_enabled():  # CUDA graphs hold training passes only
            return values_P.to(dtype)
        if self._copy_P is None or self._copy_P.dtype != dtype:
            self._copy_P = torch.empty_like(values_P, dtype=dtype, requires_grad=False)
        return CastInto.apply(values_P, (self._copy_P,))

    def forget_copies(self) -> None:
        """Empty the cast cache."""
        for layer in self.layers.values():
            layer.__dict__["low"] = None

    def refuse_live_graphs(self) -> None:
        """
        Raises:
            DynloraError: a forward pass still waits for its backward pass, or somebody still holds its loss.
        """
        if self.graphs:
            raise DynloraError(
                "components cannot change while an autograd graph through them is alive: "
                "its backward would train tensors that no longer exist",
                "run backward and drop the loss first",
            )

    @contextmanager
    def masked(self, keep_K: Tensor) -> Iterator[None]:
        """Within the `with` block the model computes with these components only. [K], boolean"""
        per_layer = keep_K.to(self.values).split(list(self.counts.values()))
        for layer, keep_C in zip(self.layers.values(), per_layer, strict=True):
            layer.gate = keep_C
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.gate = None

    def gate_gradient_K(self) -> Tensor:
        """The gradient of the loss for every component gate, from the gradient in `values.grad`. [K]

        A component gate g_i scales a component: W' = W + s Σ g_i b_i a_iᵀ, with g = 1 in training. By the chain rule
        dL/dg_i = <a_i, dL/da_i> = <b_i, dL/db_i>, so it takes no pass of its own.
        """
        layers = list(self.layers.values())
        if self.a_frozen or any(type(layer).gate_gradient_C is not ComponentLinear.gate_gradient_C for layer in layers):
            return torch.cat([layer.gate_gradient_C(layer.a_CI.detach(), layer.b_OC.detach()) for layer in layers])
        # The same on the flat tensors, for adjacent layers of one width at once: on a GPU the number of calls counts.
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
        """A policy's scores after each layer's own `ranked`, which variants may change. [K]"""
        parts = zip(self.layers.values(), scores_K.split(list(self.counts.values())), strict=True)
        return torch.cat([layer.ranked(scores_C) for layer, scores_C in parts])

    def begin_step(self, step: int, total_steps: int) -> None:
        """Tell every layer that optimizer step `step` (from 1) is next."""
        for layer in self.layers.values():
            layer.begin_step(step, total_steps)

    def settle_gradient(self) -> None:
        """Tell every layer that the gradient of an optimizer step is complete, before it is clipped."""
        for layer in self.layers.values():
            layer.settle_gradient()

    def stand_after(self, step: int, total_steps: int) -> None:
        """Bring the layers' own state to where it was after optimizer step `step`, on resuming from a checkpoint.

        Variants keep state that follows from the step (such as a schedule) and is not in the checkpoint.
        """
        self.begin_step(step, total_steps)
        self.after_update(0.0)

    def after_update(self, rate: float) -> None:
        """Tell every layer that the optimizer has stepped with this learning rate."""
        self.forget_copies()
        for group in self.sharing:
            group.finish()
        for layer in self.layers.values():
            layer.after_update(rate)

    def penalty(self) -> Tensor | None:
        """The sum of what the layers add to the loss of an optimizer step; None if they add nothing."""
        parts = [part for layer in self.layers.values() if (part := layer.penalty()) is not None]
        if self.orthogonality:
            old_and_new = [(layer.factors()[0], layer.old) for layer in self.layers.values()]
            between = overlap_penalty(old_and_new, self.orthogonality)
            parts += [] if between is None else [between]
        return torch.stack(parts).sum() if parts else None

    def numbers_P(self, chosen_K: Tensor) -> Tensor:
        """Turn a choice of components [K] into one of the pool's numbers. [P], boolean"""
        chosen_P = torch.zeros(self.parameters, dtype=torch.bool, device=self.values.device)
        per_layer = chosen_K.to(self.values.device).split(list(self.counts.values()))
        for (a, b), chosen_C in zip(self.views(chosen_P), per_layer, strict=True):
            a[chosen_C] = True
            b[:, chosen_C] = True
        return chosen_P

    def survive(self, survivors: Sequence[Tensor]) -> None:
        """Note for every layer which of its initial components are left, by their index at the start."""
        self._held_P = None
        for layer, survivors_C in zip(self.layers.values(), survivors, strict=True):
            layer.survivors_C = survivors_C

    def costs_K(self) -> Tensor:
        """The cost of every component, see `cost`. [K], int64"""
        return self._per_component([self.cost(name) for name in self.layers])

    def layers_K(self) -> Tensor:
        """The index of the layer that each component belongs to. [K], int64"""
        return self._per_component(list(range(len(self.layers))))

    def _per_component(self, per_layer: list[int]) -> Tensor:
        device = self.values.device
        counts = torch.tensor(list(self.counts.values()), device=device)
        return torch.tensor(per_layer, device=device).repeat_interleave(counts)
