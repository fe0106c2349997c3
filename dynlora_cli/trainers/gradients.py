"""The gradient of a step as the policies want it: accumulated, not yet clipped, of all components as one flat tensor.

A callback is asked only after the trainer has clipped. So hooks on the leaves copy what has been added up, at the last
backward pass of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora_cli.lora.pool import Pool


class FlatGradient:
    """Gathers the gradients of all leaves into `pool.values.grad`, for as long as it is on.

    Args:
        pool: the components.
        accumulation: knows whether the backward pass at hand is the last one of its optimizer step.
    """

    def __init__(self, pool: Pool, accumulation: GradientState) -> None:
        self.pool, self.accumulation = pool, accumulation
        self._handles: list[RemovableHandle] = []
        self._views: list[Tensor] = []

    def begin(self) -> None:
        """Before an optimizer step: set the gradient to zero; hooks are put on leaves that have none."""
        if self._handles:
            assert self.pool.values.grad is not None
            self.pool.values.grad.zero_()
            return
        self.pool.values.grad = torch.zeros_like(self.pool.values.detach())
        self._views = [part for pair in self.pool.views(self.pool.values.grad) for part in pair]
        for leaf, view in zip(self.pool.leaves, self._views, strict=True):
            if leaf.requires_grad:
                self._handles.append(leaf.register_post_accumulate_grad_hook(partial(self._copy, view)))

    def _copy(self, view: Tensor, leaf: Tensor) -> None:
        if leaf.grad is not None and self.accumulation.sync_gradients:
            view.copy_(leaf.grad)

    def end(self) -> None:
        """Take the hooks off, and free the flat gradient; it is there no longer when the leaves are others."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._views = [], []
        self.pool.values.grad = None

    @contextmanager
    def in_leaves(self) -> Iterator[None]:
        """Inside the block the leaves' gradients are these, instead of the trainer's, which may be clipped."""
        leaves = self.pool.leaves
        before = [leaf.grad for leaf in leaves]
        for leaf, view in zip(leaves, self._views, strict=True):
            leaf.grad = view
        try:
            yield
        finally:
            for leaf, grad in zip(leaves, before, strict=True):
                leaf.grad = grad


class Targets:
    """Counts what the gradient of a step is the mean of: the trainer's own number, labels, or rows.

    Attributes:
        given: the trainer's own number, of all processes; None: it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.begin()
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def begin(self) -> None:
        """Before an optimizer step."""
        self.given: float | Tensor | None = None
        self._seen: list[int | Tensor] = []

    @property
    def count(self) -> float:
        """Of the step so far; at least 1."""
        return max(1.0, float(sum(self._seen)) if self.given is None else float(self.given))

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        # Tensors stay on the device, which would have to be waited for.
        given, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if given is not None:
            self.given = given
        elif isinstance(labels, Tensor):
            self._seen.append((labels != -100).sum())
        else:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
            self._seen.append(1 if first is None else len(first))

    def end(self) -> None:
        """Look no longer."""
        self._handle.remove()
