"""What calibration data, a few batches of the training rows, tells about the layers of the base before training.

    watch_inputs    principal directions of what goes into each layer
    weigh           how much each layer matters, by the gradient of its frozen weight

Dimensions: I inputs, O outputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.directions import Directions
from dynlora_cli.models.linear import dense_weight, linear_shape
from dynlora_cli.tasks.loss import IGNORE, evaluating, summed_loss

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

Layers = Mapping[str, nn.Module]
Autocast = Callable[[], AbstractContextManager[Any]]
Change = Callable[[str, Tensor], Tensor]  # the inputs of a layer [N, I], by its name, to others of the same shape
Measure = Callable[[Tensor, Tensor], Tensor]  # a number for a weight and its gradient, both [O, I] in fp32
MEASURES: dict[str, Measure] = {
    # GoRA (arXiv 2502.12171): importance. Here each batch is measured; the paper first sums the gradients of many.
    "gora": lambda weight_OI, gradient_OI: (weight_OI * gradient_OI).abs().mean(),
    # Sensitivity-LoRA (arXiv 2509.09119): the trace of the Hessian, here of the empirical Fisher in its place.
    "sensitivity": lambda weight_OI, gradient_OI: gradient_OI.square().sum(),  # noqa: ARG005
}


def watch_inputs(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Layers,
    counts: Mapping[str, int],
    autocast: Autocast = nullcontext,
    *,
    around_zero: bool = False,
    change: Change | None = None,
    found: dict[str, Directions] | None = None,
) -> dict[str, Directions]:
    """The principal directions of each layer's inputs, at the tokens that carry loss.

    Args:
        model: the base.
        batches: on its device.
        layers: of the model, by name.
        counts: directions wanted of each layer, at least.
        autocast: makes the context of the forward pass.
        around_zero: instead, those of the inputs as they are, mean and all, at every token that is no padding.
        change: what of the inputs is looked at; None: all.
        found: of an earlier call, to go on with.

    Raises:
        UsageError: the model did not use one of the layers.
    """
    inputs = _Inputs(layers, counts, centered=not around_zero, change=change, found=found)
    hooked = _hooked(layers, lambda name, layer: layer.register_forward_pre_hook(partial(inputs.look, name)))
    with hooked, evaluating(model):
        for batch in batches:
            inputs.tokens = _real(batch) if around_zero else _with_loss(batch)
            with autocast():
                summed_loss(model, batch.in_one())
    for name in layers:
        if name not in inputs.found:
            raise UsageError(
                f"nothing went into {name} on the first batches, so eva cannot tell how to start it",
                "leave it out of adapter.target_modules, or choose another start",
            )
    return inputs.found


def weigh(
    model: nn.Module, batches: Iterable[Batch], layers: Layers, measure: Measure, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """The sum over batches of a measure of each layer's weight and its gradient.

    Only one gradient is in memory at a time: it is made when the backward pass reaches its layer, measured and dropped.

    Args:
        model: the base; its parameters get no gradients.
        batches: on its device.
        layers: of the model, by name.
        measure: such as one of MEASURES.
        autocast: makes the context of the forward pass.
    """
    sums = dict.fromkeys(layers, 0.0)
    anchor = torch.zeros((), requires_grad=True)

    def look(name: str, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        return _Watched.apply(y, inputs[0], anchor, partial(take, name, layer))

    def take(name: str, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        gradient_OI = grad.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        sums[name] += measure(dense_weight(layer), gradient_OI).item()

    was_training = model.training
    model.train()  # as in training, so that checkpointing saves memory here too
    try:
        with _hooked(layers, lambda name, layer: layer.register_forward_hook(partial(look, name))):
            for batch in batches:
                with autocast():
                    loss = summed_loss(model, batch.in_one())
                loss.backward(inputs=[anchor])
    finally:
        model.train(was_training)
    return sums


class _Inputs:
    """Collects the principal directions of what layers are given. Layers that get the same tensor right one after the
    other, as queries, keys and values do, share them."""

    def __init__(
        self,
        layers: Layers,
        counts: Mapping[str, int],
        *,
        centered: bool = True,
        change: Change | None = None,
        found: dict[str, Directions] | None = None,
    ) -> None:
        self.centered, self.change = centered, change
        widths = {name: linear_shape(layer)[0] for name, layer in layers.items()}
        self.wanted = {name: max(counts[other] for other in layers if widths[other] == widths[name]) for name in layers}
        self.found: dict[str, Directions] = {} if found is None else found
        self.tokens: Tensor | None = None  # of the batch in hand: which to look at, [B, T]; None: all
        self._last: tuple[Tensor | None, str] = (None, "")

    def look(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG002
        x = inputs[0]
        if x is self._last[0]:
            self.found[name] = self.found[self._last[1]]
            return
        self._last = x, name
        directions = self.found.setdefault(name, Directions(self.wanted[name], centered=self.centered))
        chosen = self.tokens is not None and self.tokens.shape == x.shape[:-1]
        x_NI = x[self.tokens] if chosen else x.flatten(0, -2)
        directions.add(self.change(name, x_NI) if self.change else x_NI)


class _Watched(torch.autograd.Function):
    """Passes a layer's output on unchanged, and in the backward pass calls `take` with the layer's input and gradient.

    The input is kept by `save_for_backward`, so that checkpointing may drop it and compute it again. A frozen model has
    no autograd graph of its own; the anchor, which requires a gradient and gets none, makes one.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.take(*ctx.saved_tensors, grad)
        return grad, None, None, None


@contextmanager
def _hooked(layers: Layers, hook: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Hooks on all layers inside the block."""
    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_loss(batch: Batch) -> Tensor | None:
    """Which tokens carry loss, [B, T]; of a classifier, which are no padding; None: all."""
    return batch.labels != IGNORE if batch.labels.ndim == 2 else _real(batch)


def _real(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, [B, T]; None: all, as in packed rows."""
    mask = batch.inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None
