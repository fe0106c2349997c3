"""Layers that read the same input compute together: q, k and v of an attention, gate and up of a feed-forward part.

The model calls them one after the other, and only what it gives them tells that they belong together. So one pass is
listened to. From then on the first of them computes for all, and the others hand out what it made.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dynlora_cli.fused_linear import Part, fused_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dynlora_cli.components import ComponentLinear


class SharedInput:
    """Layers that are given one tensor, one right after the other.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: list[ComponentLinear]) -> None:
        self.layers = layers
        self._x: Tensor | None = None
        self._version = 0  # of x: what has been changed in place since is another input
        self._waiting: dict[ComponentLinear, Tensor] = {}
        for layer in layers:
            layer.shared = self

    def __call__(self, layer: ComponentLinear, x: Tensor) -> Tensor | None:
        """What this layer makes of x, [..., O]; None where it has to compute alone."""
        if layer in self._waiting and x is self._x and x._version == self._version:
            y = self._waiting.pop(layer)
            if not self._waiting:
                self._x = None
            return y
        alive = [other for other in self.layers if other.count]
        if layer is not alive[0] or not all(other.fusable(x) for other in alive[1:]):
            return None
        low = torch.is_autocast_enabled(x.device.type)
        parts = [Part(other.base, other.factors(), other.low if low else None) for other in alive]
        y, *rest = fused_together(x, parts, layer.scale)
        if rest:
            self._x, self._version, self._waiting = x, x._version, dict(zip(alive[1:], rest, strict=True))
        return layer.watched(y)

    def finish(self) -> None:
        """After a pass: layers that were not all given the same are left alone from now on."""
        if self._waiting:
            self._x, self._waiting = None, {}
            for layer in self.layers:
                layer.shared = None


def share_inputs(model: nn.Module, layers: Iterable[ComponentLinear], run: Callable[[], object]) -> None:
    """Let the layers of a model share what they read.

    Args:
        model: is watched: if layers are no longer all given the same, they compute alone again.
        layers: of which some may be given the same.
        run: runs the model once, without gradients.
    """
    runs: list[tuple[Tensor, list[ComponentLinear]]] = []

    def hear(layer: nn.Module, args: tuple[Any, ...]) -> None:
        (x,) = args
        if not (runs and runs[-1][0] is x):
            runs.append((x, []))
        runs[-1][1].append(cast("ComponentLinear", layer))

    hooks = [layer.register_forward_pre_hook(hear) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(layer for _, run in runs for layer in run)
    groups = [
        SharedInput(run)
        for _, run in runs
        if len(run) > 1 and all(calls[layer] == 1 for layer in run) and len({layer.scale for layer in run}) == 1
    ]

    def end(*_: Any) -> None:
        for group in groups:
            group.finish()

    model.register_forward_hook(end, always_call=True)
