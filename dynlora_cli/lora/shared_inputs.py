"""Layers that read the same input compute together: q, k and v of an attention, gate and up of a feed-forward part.

The model calls the layers one after the other, and nothing but the equal input tells that they belong together. So one
pass is observed with hooks to find the groups. From then on the first layer of a group computes the outputs of all;
the others, when they are called with that same input, return what is waiting for them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dynlora_cli.kernels.fused_lora import Part, fused_together

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynlora_cli.lora.layer import ComponentLinear


class SharedInput:
    """A group of layers that are called with the same tensor, directly one after the other.

    Called by each of its layers in their `forward`, as `layer.shared`.

    Args:
        layers: in the order in which the model calls them.
    """

    def __init__(self, layers: list[ComponentLinear]) -> None:
        self.layers = layers
        self._x: Tensor | None = None
        self._version = 0  # of x when it was read; a tensor that was changed in place since counts as another input
        self._waiting: dict[ComponentLinear, Tensor] = {}
        for layer in layers:
            layer.shared = self

    def __call__(self, layer: ComponentLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, [..., O]; None if it has to compute alone."""
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
        """At the end of a step: split up a group whose layers were not all called with the same input this time.

        An output that nobody fetched was computed in vain, so these layers compute alone from now on.
        """
        if self._waiting:
            self._x, self._waiting = None, {}
            for layer in self.layers:
                layer.shared = None


def share_inputs(layers: Mapping[str, ComponentLinear], run: Callable[[], object]) -> list[SharedInput]:
    """Find layers that read the same input, and let them compute together.

    Only layers of one parent module are grouped. Layers of different blocks may read the same tensor as well, but a
    block can be skipped, or run again by gradient checkpointing, without the other.

    Args:
        layers: by name.
        run: runs the model once, without gradients.

    Returns:
        the groups; `finish` is to be called on each when a step is over.
    """
    parents = {layer: name.rpartition(".")[0] for name, layer in layers.items()}
    calls: Counter[ComponentLinear] = Counter()
    runs: list[list[ComponentLinear]] = []
    last: Any = None  # of the last call: its input, the input's version and the parent module

    def hear(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        (x,), layer = args, cast("ComponentLinear", module)
        if not (last and last[0] is x and last[1:] == (x._version, parents[layer])):
            runs.append([])
        last = x, x._version, parents[layer]
        runs[-1].append(layer)
        calls[layer] += 1

    hooks = [layer.register_forward_pre_hook(hear) for layer in parents]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        SharedInput(run)
        for run in runs
        if len(run) > 1 and all(calls[layer] == 1 for layer in run) and len({layer.scale for layer in run}) == 1
    ]
