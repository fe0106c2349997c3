"""Several adapters on one base in memory: every row of a batch uses the base, one of them, or a mix of several.

The base's weights are there once, and an adapter costs what its components cost. An adapter that is more than
components of linear layers (a DoRA, one with a head of its own ...) cannot share a batch with others. It goes alone:
the others are off while it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import PLAIN, Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.bank_check import differs, survey
from dynlora_cli.adapters.base import holds_weight, module_of
from dynlora_cli.adapters.numbers import LARGEST
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.config.mix import LARGEST as LARGEST_WEIGHT
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.multi import Choice, MultiLinear, TokenGates
from dynlora_cli.text import did_you_mean

Part = tuple[int, Tensor, Tensor]  # an adapter's column, and its a [C, I] and b [O, C] in a layer
Mix = Mapping[str, float]  # weights by the names of adapters; {} is the base


class Bank:
    """Adapters on a model, which is changed in place until `close`.

    Args:
        model: the base, on its device.
        adapters: by name. The bank copies their components; those that go alone are kept.

    Attributes:
        names: of all adapters; the columns of a batch's weights.
        alone: the adapters that cannot share a batch with others, and why, in words.
        layers: the layers that any of the others adapts, by name.
        notes: what the check of a mixed batch found, in words.

    Raises:
        UsageError: a layer of an adapter does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> None:
        self.model = model
        self.choice = Choice()
        self.names: list[str] = []
        self.alone: dict[str, str] = {}
        self.layers: dict[str, MultiLinear] = {}
        self._alone: dict[str, Adapter] = {}
        self._off = False  # the model is the plain base at the moment, for an adapter that is alone
        self._active = 0
        self.notes: list[str] = []
        self._surveyed: dict[str, str | None] = {}  # layers, and what is wrong with their rows
        self._rounding = 0.0
        try:
            self._take(adapters)
            self._check(adapters)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def bytes(self) -> int:
        """Of all components in the layers."""
        return sum(buffer.nbytes for layer in self.layers.values() for buffer in layer.buffers(recurse=False))

    # -- adapters come and go ------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on the model, too.

        Raises:
            UsageError: there is one of that name, or it does not fit the model.
        """
        self._take({name: adapter})
        self._check({name: adapter})

    def remove(self, name: str) -> None:
        """Take an adapter off the model.

        Raises:
            UsageError: there is none of that name.
        """
        self._refuse_use("removed")
        gone = self._column(name)
        self.names.remove(name)
        self.alone.pop(name, None)
        self._alone.pop(name, None)
        for layer_name in list(self.layers):
            parts = _parts(self.layers[layer_name])
            self._hold(layer_name, [(column - (column > gone), a, b) for column, a, b in parts if column != gone])

    def close(self) -> None:
        """Take everything off: the model is as it was."""
        if not self._off:
            self._take_off()
        self.layers.clear()
        self.names.clear()
        self.alone.clear()
        self._alone.clear()

    # -- who uses what -------------------------------------------------------------------------------------------------

    @contextmanager
    def active(self, mixes: Sequence[Mix]) -> Iterator[None]:
        """The model computes row i of a batch with mix i inside the block.

        Each request's rows follow one another: a batch of k times as many rows gives k to each request.

        Args:
            mixes: one for each request. An adapter that goes alone: `{name: 1.0}` in all of them.

        Raises:
            UsageError: a name that is not there, or an adapter that goes alone and is asked for beside others.
        """
        if not mixes:
            raise ValueError("a batch has one request at least")
        alone = self._alone_in(mixes)
        weights_BE = torch.zeros(len(mixes), len(self.names))
        for row, mix in enumerate(mixes):
            for name, weight in mix.items():
                if not abs(weight) <= LARGEST_WEIGHT:
                    raise UsageError(f"the weight of {name} is {weight}", f"give {LARGEST_WEIGHT:.1e} at most")
                weights_BE[row, self._column(name)] = weight
        with self._using(weights_BE, None), ExitStack() as stack:
            if alone is not None:
                stack.enter_context(self._plain())
                stack.enter_context(attached(self.model, self._alone[alone]))
            yield

    @contextmanager
    def routed(self, gates: TokenGates) -> Iterator[None]:
        """The model asks `gates` at every token, in every layer, inside the block."""
        with self._using(None, gates):
            yield

    @contextmanager
    def _using(self, weights_BE: Tensor | None, gates: TokenGates | None) -> Iterator[None]:
        if self._off:
            raise RuntimeError("an adapter that goes alone is in use")
        before = self.choice.weights_BE, self.choice.gates
        self.choice.weights_BE, self.choice.gates = weights_BE, gates
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            self.choice.weights_BE, self.choice.gates = before

    def _alone_in(self, mixes: Sequence[Mix]) -> str | None:
        """The adapter of this batch that goes alone."""
        for mix in mixes:
            for name in mix:
                if name in self.alone and any(dict(other) != {name: 1.0} for other in mixes):
                    raise UsageError(
                        f"{name} cannot be blended or share a batch with others: {self.alone[name]}",
                        f"use {name} by itself",
                    )
                if name in self.alone:
                    return name
        return None

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The model without any layer of the bank."""
        self._take_off()
        self._off = True
        try:
            yield
        finally:
            self._off = False
            for name, layer in self.layers.items():
                self._set(name, layer)

    # -- the check of a mixed batch ------------------------------------------------------------------------------------

    def _check(self, adapters: Mapping[str, Adapter]) -> None:
        """Let adapters go alone that would not be in a batch what they are by themselves."""
        try:
            self._check_layers(adapters)
            shared = [name for name in adapters if name not in self.alone]
            if shared and self._differs(shared):
                guilty = {name: found for name in shared if (found := self._differs([name]))}
                for name in guilty or shared:
                    found = guilty.get(name) or self._differs(shared)
                    self._go_alone(name, adapters[name], f"in a mixed batch it is {found}")
        except Exception as error:  # of the model's own code, which may want more than a text
            for name in adapters:
                if name not in self.alone:
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    self._go_alone(name, adapters[name], f"the check of a mixed batch failed: {why}")

    def _check_layers(self, adapters: Mapping[str, Adapter]) -> None:
        new = {name: layer.base for name, layer in self.layers.items() if name not in self._surveyed}
        if new:
            wrong, self._rounding = survey(self.model, new)
            self._surveyed |= {name: wrong.get(name) for name in new}
        for name, adapter in adapters.items():
            found = [(layer, self._surveyed.get(layer)) for layer in adapter.layers if self._surveyed.get(layer)]
            if found and name not in self.alone:
                layer, why = found[0]
                self._go_alone(name, adapter, f"its layer {layer} {why}")

    def _differs(self, names: Sequence[str]) -> str | None:
        """What is wrong with a batch of two requests that share these adapters out; the mean, so none bursts."""
        halves = names[::2], names[1::2]
        mixes = {name: 1 / len(halves[0]) for name in halves[0]}, {name: 1 / len(halves[0]) for name in halves[1]}
        return differs(self.model, self.active, mixes, self._rounding)

    def _go_alone(self, name: str, adapter: Adapter, why: str) -> None:
        column = self.names.index(name)
        for layer_name in list(self.layers):
            self._hold(layer_name, [part for part in _parts(self.layers[layer_name]) if part[0] != column])
        self.alone[name], self._alone[name] = why, adapter
        self.notes.append(f"{name} cannot share a batch with other adapters: {why}")

    # ------------------------------------------------------------------------------------------------------------------

    def _take(self, adapters: Mapping[str, Adapter]) -> None:
        """Hold the components of adapters; each layer is made once, however many they are."""
        self._refuse_use("added")
        for name in adapters:
            if name in self.names:
                raise UsageError(
                    f"there is an adapter {name} already", "give this one another name, or remove that one"
                )
        with self._plain():
            reasons = {name: why_alone(self.model, adapter) for name, adapter in adapters.items()}
        new: dict[str, list[Part]] = {}
        for column, (name, adapter) in enumerate(adapters.items(), start=len(self.names)):
            self.names.append(name)
            if reason := reasons[name]:
                self.alone[name], self._alone[name] = reason, adapter
                continue
            for layer, factors in adapter.layers.items():
                if factors.rank:
                    new.setdefault(layer, []).append((column, factors.a_CI, factors.b_OC))
        for layer, parts in new.items():
            held = _parts(self.layers[layer]) if layer in self.layers else []
            self._hold(layer, [*held, *parts])

    def _refuse_use(self, done: str) -> None:
        if self._active:
            raise RuntimeError(f"an adapter cannot be {done} while the bank is in use")

    def _column(self, name: str) -> int:
        if name not in self.names:
            there_are = f"there are: {', '.join(self.names)}" if self.names else "there are none"
            raise UsageError(f"there is no adapter {name}{did_you_mean(name, self.names)}", there_are)
        return self.names.index(name)

    def _hold(self, name: str, parts: list[Part]) -> None:
        """Let a layer hold these components. It is put on the model for the first, and taken off with the last."""
        layer = self.layers.get(name)
        if layer is None:
            module = self.model.get_submodule(name)
            layer = self.layers[name] = MultiLinear(module, name, self.choice).train(module.training)
            self._set(name, layer)
        if not parts:
            self._set(name, layer.base)
            del self.layers[name]
        elif len(parts) == len(layer.adapters):
            layer.number([column for column, _, _ in parts])
        else:
            layer.hold(parts)

    def _take_off(self) -> None:
        for name, layer in self.layers.items():
            self._set(name, layer.base)

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


def why_alone(model: PreTrainedModel, adapter: Adapter) -> str | None:
    """Why an adapter cannot share a batch with others, in words; None where it can.

    Raises:
        UsageError: a layer does not fit the model.
    """
    if isinstance(adapter, RoutedAdapter):
        return "it is a router over adapters of its own"
    reasons = [_layer_alone(model, adapter, name) for name in adapter.layers]
    if own := adapter.own_numbers():
        return own
    return next((reason for reason in reasons if reason), None)


def _layer_alone(model: PreTrainedModel, adapter: Adapter, name: str) -> str | None:
    factors = adapter.layers[name]
    if factors.experts:
        return f"it changes single experts, such as {name}"
    module = module_of(model, name, factors, adapter)
    if factors.kind != PLAIN:
        return f"it is a {adapter.kind}, which does more than add to the base's weights"
    if factors.embedding:
        return f"it changes a table of tokens, {name}"
    if holds_weight(module):
        return f"it changes {name}, a {type(module).__name__} and no linear layer"
    # A row's gate of 0 takes away what another adapter makes of it, but not a NaN, nor what has overflowed.
    if factors.rank and not all(t.abs().max() < LARGEST for t in (factors.a_CI, factors.b_OC)):
        return f"{name} has numbers beyond {LARGEST:g} in it, or no numbers"
    return None


def _parts(layer: MultiLinear) -> list[Part]:
    """The components that a layer holds, as `MultiLinear.hold` takes them."""
    places = zip(layer.adapters, layer.slices, strict=True)
    return [(column, layer.a_RI[part], layer.b_OR[:, part]) for column, part in places]
