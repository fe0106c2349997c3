"""The adapters of a trained router on a model: every layer that one of them adapts holds all of them, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli.adapters import kind
from dynlora_cli.adapters.adapter import PLAIN, Adapter, Factors
from dynlora_cli.adapters.base import holds_weight, module_of
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.multi import Choice, MultiLinear, TokenGates
from dynlora_cli.lora.routers.mixed import MixedLinear
from dynlora_cli.models.linear import dense_weight


class SideBySide:
    """Adapters on a model, which is changed in place until `close`.

    Args:
        model: the base, on its device.
        members: the adapters by name, in the order of their columns.
        kinds: adapters that are no plain LoRA are taken, too.

    Attributes:
        layers: those that any of them adapts, by name, in the order of the model.

    Raises:
        UsageError: a layer of an adapter does not fit the model, or no router can weigh it.
    """

    def __init__(self, model: PreTrainedModel, members: Mapping[str, Adapter], *, kinds: bool) -> None:
        self.model, self.choice = model, Choice()
        self.layers: dict[str, MultiLinear] = {}
        for name, member in members.items():
            refuse_strangers(model, name, member, kinds=kinds)
        adapted = {layer for member in members.values() for layer in member.layers}
        for name in [name for name, _ in model.named_modules() if name in adapted]:
            parts = {
                column: member.layers[name]
                for column, member in enumerate(members.values())
                if name in member.layers and member.layers[name].rank
            }
            if parts:
                self.layers[name] = self._layer(name, parts).train(model.training)
                self._set(name, self.layers[name])

    def close(self) -> None:
        """Take everything off: the model is as it was."""
        for name, layer in self.layers.items():
            self._set(name, layer.base)
        self.layers.clear()

    @contextmanager
    def routed(self, gates: TokenGates) -> Iterator[None]:
        """The model asks `gates` at every token, in every layer, inside the block."""
        before, self.choice.gates = self.choice.gates, gates
        try:
            yield
        finally:
            self.choice.gates = before

    def _layer(self, name: str, parts: Mapping[int, Factors]) -> MultiLinear:
        base = self.model.get_submodule(name)
        layer = MixedLinear(base, name, self.choice)
        layer.hold([(column, f.a_CI, f.b_OC) for column, f in parts.items() if f.kind == PLAIN])
        others = {column: f for column, f in parts.items() if f.kind != PLAIN}
        layer.add(list(others), [apart(base, factors) for factors in others.values()])
        return layer

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


def refuse_strangers(model: PreTrainedModel, name: str, adapter: Adapter, *, kinds: bool) -> None:
    """Check that a router can weigh what an adapter does.

    Args:
        model: the plain base.
        name: of the adapter.
        adapter: one that a router is to weigh.
        kinds: of any kind.

    Raises:
        UsageError: it cannot, or the adapter does not fit the model.
    """
    why = adapter.own_numbers()
    for layer, factors in adapter.layers.items():
        module = module_of(model, layer, factors, adapter)
        if factors.embedding or factors.experts:
            why = f"it changes {layer}, which is no linear layer that every token passes"
        elif holds_weight(module):
            why = f"it changes {layer}, a {type(module).__name__} and no linear layer"
        elif factors.kind != PLAIN and not kinds:
            raise UsageError(
                f"{name} is a {adapter.kind}, and this router weighs plain LoRAs",
                "write `adapter.variant: moa`, which weighs adapters of any kind, or leave it out",
            )
    if why:
        raise UsageError(f"{name} cannot be weighed by token: {why}", "leave it out")


def apart(base: nn.Module, factors: Factors) -> ComponentLinear:
    """An adapter's layer of its own, on the base's."""

    def bias() -> Tensor | None:
        own: Any = base.bias
        return own

    weight: Any = base.weight
    device = weight.device
    own = {key: tensor.to(device) for key, tensor in factors.own.items()}
    layer = kind.of(factors).layer(base, replace(factors, own=own), partial(dense_weight, base), bias)
    layer.fuse = False  # ordinary operations: their gradient is that of x alone
    layer.a_CI = nn.Parameter(factors.a_CI.to(device), requires_grad=False)
    layer.b_OC = nn.Parameter((factors.b_OC / factors.scale).to(device), requires_grad=False)
    return layer
