"""Puts an adapter from a folder on a model in memory, and takes it off again; the base is loaded once for many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace as changed
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dynlora_cli.adapters import kind
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.base import expert_slices, holds_weight, module_of
from dynlora_cli.adapters.expert_files import parts_of
from dynlora_cli.adapters.replaced import Replacement, fit_sizes, new_vocabulary, replacements, tied_names
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.timesteps.layer import in_time
from dynlora_cli.models.experts import join, split
from dynlora_cli.models.linear import dense_weight, is_transposed


class AdaptedEmbedding(nn.Module):
    """A table of tokens plus a low-rank table: row t of b_OC @ a_CI is added to row t. DoRA scales the columns then.

    Args:
        base: the table.
        factors: of it, or of its DoRA.
        weight: gives the table's weight, [O, I] in fp32.
        device: of the factors.
    """

    def __init__(self, base: nn.Module, factors: Factors, weight: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()
        self.base = base
        magnitude_I = factors.own.get("magnitude_I")
        # Norms are taken over all tokens, PEFT's way: of the columns, not of the rows.
        self.ratio_I = None if magnitude_I is None else magnitude_I.to(device) / _norms_I(weight(), factors).to(device)
        self.a_CI = nn.Parameter(factors.a_CI.to(device), requires_grad=False)
        self.b_OC = nn.Parameter(factors.b_OC.to(device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., I]."""
        y = self.base(ids)
        scale = getattr(self.base, "embed_scale", 1.0)  # Gemma's tables and others multiply their rows
        more = F.embedding(ids, self.b_OC) @ self.a_CI * scale
        if self.ratio_I is None:
            return y + more.to(y.dtype)
        # Not y * ratio: in bf16 a ratio near 1 would lose what was learned.
        return y + (y * (self.ratio_I - 1) + more * self.ratio_I).to(y.dtype)


def _norms_I(W_OI: Tensor, factors: Factors) -> Tensor:
    """‖W + BA‖ over the outputs of each input, from thin products."""
    a_CI, b_OC = factors.a_CI.to(W_OI), factors.b_OC.to(W_OI)
    cross_I = ((b_OC.T @ W_OI) * a_CI).sum(0)
    own_I = (((b_OC.T @ b_OC) @ a_CI) * a_CI).sum(0)
    return (W_OI.square().sum(0) + 2 * cross_I + own_I).clamp_min(0).sqrt()


@contextmanager
def attached(
    model: PreTrainedModel,
    adapter: Adapter,
    *,
    device: torch.device | None = None,
    read: Callable[[str], Tensor] | None = None,
    whole: bool = True,
) -> Iterator[Pool]:
    """The model with the adapter inside the block, and as it was after it.

    Args:
        model: the base; changed in place.
        adapter: its layers get components, as one pool. s is the adapter's own, so that training can go on. A routed
            adapter gives an empty pool: its adapters are frozen.
        device: of the components; by default the model's.
        read: gives a parameter of the base by its name, in fp32, where the model itself holds none, as in
            models/streamed.py.
        whole: also put in the tensors that replace the base's own.

    Raises:
        UsageError: a layer does not fit the model.
    """
    if isinstance(adapter, RoutedAdapter):
        with adapter.put_on(model):
            yield Pool({}, {}, device=device or model.device)
        return
    on = _Attachment(model, adapter, device or model.device)
    try:
        on.put_experts()
        if whole:
            on.put_replaced()
        yield on.put_layers(read)
    finally:
        on.take_off()


class _Attachment:
    """What was changed in a model for an adapter, so that it can be changed back."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, device: torch.device) -> None:
        self.model, self.adapter, self.device = model, adapter, device
        self.before: list[tuple[nn.Module, str, nn.Module]] = []
        self.hooks: list[RemovableHandle] = []
        self.undo: list[Callable[[], None]] = []
        if adapter.experts:
            split(model, others=True)

    def put_experts(self) -> None:
        """Experts of a form that is not split compute with W + ΔW."""
        for parameter, slices in expert_slices(self.model, self.adapter).items():
            owner, _, leaf = parameter.rpartition(".")
            module = self.model.get_submodule(owner)
            if not _is_split(module):
                self.hooks += _add(module, leaf, _stacked(slices).to(self.device))

    def put_replaced(self) -> None:
        """What takes the place of the base's own parameters; those that are the same stay one."""
        found = replacements(self.model, self.adapter)
        made: list[tuple[Replacement, nn.Parameter]] = []
        for name, new in found.items():
            owner, _, leaf = name.rpartition(".")
            module, own = self.model.get_submodule(owner), self.model.get_submodule(owner)._parameters.get(leaf)
            twin = next(
                (value for other, value in made if name in tied_names(self.model, other.name) and other.same(new)), None
            )
            if twin is None:
                value = new.made(lambda name: self.model.get_parameter(name).detach())
                twin = nn.Parameter(value.to(self.device, _type_beside(module, own)), requires_grad=False)
                made.append((new, twin))
            self._replace(owner, _with_parameter(module, leaf, twin))
        config = self.model.config.get_text_config()
        if (size := new_vocabulary(self.model, found)) is not None:
            self.undo.append(partial(setattr, config, "vocab_size", config.vocab_size))
            config.vocab_size = size

    def put_layers(self, read: Callable[[str], Tensor] | None) -> Pool:
        """Every adapted layer, in the place of the base's; a pool of those that have components to train."""
        layers: dict[str, ComponentLinear] = {}
        for name, factors in self.adapter.layers.items():
            if factors.experts and not _is_split(self.model.get_submodule(parts_of(name)[0])):
                continue
            module = module_of(self.model, name, factors, self.adapter)
            if holds_weight(module):
                self.hooks += _add(module, "weight", factors.delta_OI().to(self.device))
            elif factors.embedding:
                weight = partial(_table, module) if read is None else partial(read, f"{name}.weight")
                self._replace(name, AdaptedEmbedding(module, factors, weight, self.device))
            else:
                layers[name] = _layer(module, factors, name, read, self.device).train(self.model.training)
                self._replace(name, layers[name])
        self.hooks += in_time(self.model, layers.values())
        pool = Pool(layers, {name: self.adapter.layers[name].rank for name in layers}, device=self.device)
        with torch.no_grad():
            for name, (a, b) in zip(layers, pool.views(pool.values.detach()), strict=True):
                a.copy_(self.adapter.layers[name].a_CI)
                b.copy_(self.adapter.layers[name].b_OC / self.adapter.layers[name].scale)
        return pool

    def take_off(self) -> None:
        """The model as it was."""
        for hook in self.hooks:
            hook.remove()
        for holder, leaf, original in reversed(self.before):
            setattr(holder, leaf, original)
        for undo in self.undo:
            undo()
        if self.adapter.experts:
            join(self.model)

    def _replace(self, name: str, by: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        holder = self.model.get_submodule(parent)
        self.before.append((holder, leaf, getattr(holder, leaf)))
        setattr(holder, leaf, by)


def _is_split(experts: nn.Module) -> bool:
    """Whether each expert of a block is a module of its own, see models/experts.py."""
    return "0" in experts._modules


def _add(module: nn.Module, leaf: str, delta: Tensor) -> list[RemovableHandle]:
    """Let a module that is no linear layer, such as a router of experts, compute with W + ΔW; frozen.

    Returns:
        what takes it off again.
    """
    plain = []

    def add(module: nn.Module, _inputs: Any) -> None:
        weight: Any = module._parameters[leaf]
        plain.append(weight)
        changed = (weight.detach().float() + delta.view(weight.shape)).to(weight.dtype)
        module._parameters[leaf] = nn.Parameter(changed, requires_grad=False)

    def take_off(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        module._parameters[leaf] = plain.pop()

    # A streamed module has read its weight before, and forgets it after this; see models/streamed.py.
    after = module.register_forward_hook(take_off, prepend=True, always_call=True)
    return [module.register_forward_pre_hook(add), after]


def _stacked(slices: Mapping[int, Factors]) -> Tensor:
    """ΔW of all experts of a parameter, [E, rows, columns]; 0 of those without components."""
    some = next(iter(slices.values()))
    delta = torch.zeros(some.experts, some.b_OC.shape[0], some.a_CI.shape[1])
    for expert, factors in slices.items():
        delta[expert] = factors.delta_OI()
    return delta


def _layer(
    base: nn.Module, factors: Factors, name: str, read: Callable[[str], Tensor] | None, device: torch.device
) -> ComponentLinear:
    weight = partial(dense_weight, base) if read is None else partial(_read_dense, read, name, base)

    def bias() -> Tensor | None:
        own: Any = base.bias
        return own if read is None or own is None else read(f"{name}.bias")

    own = {key: tensor.to(device) for key, tensor in factors.own.items()}
    return kind.of(factors).layer(base, changed(factors, own=own), weight, bias)


def _table(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.detach().float()


def _read_dense(read: Callable[[str], Tensor], name: str, base: nn.Module) -> Tensor:
    weight = read(f"{name}.weight")
    return weight.T if is_transposed(base) else weight


def _with_parameter(module: nn.Module, leaf: str, value: nn.Parameter) -> nn.Module:
    """The module with another parameter; a weight that it shares with others stays theirs."""
    other = copy.copy(module)
    own = vars(module).get("forward")
    if isinstance(own, MethodType) and own.__self__ is module:  # of lean_blocks
        vars(other)["forward"] = MethodType(own.__func__, other)
    other._parameters = {**module._parameters, leaf: value}
    if leaf == "weight":
        fit_sizes(other)
    return other


def _type_beside(module: nn.Module, own: Tensor | None) -> torch.dtype:
    """The type that a parameter must have to be computed with beside those of its module."""
    weight = module._parameters.get("weight") if own is None else own
    plain = weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return weight.dtype if plain and weight is not None else torch.float32


def detached(adapter: Adapter, pool: Pool) -> Adapter:
    """The adapter with the factors that the pool holds now, each with its scale folded into B."""
    layers = {name: factors for name, factors in adapter.layers.items() if name not in pool.layers}
    for name, layer in pool.layers.items():
        old = adapter.layers[name]
        own = {key: tensor.cpu() for key, tensor in kind.own_of(old.kind, layer).items()}
        a_CI, b_OC = layer.a_CI.detach().cpu().clone(), (layer.scale * layer.b_OC.detach()).cpu()
        layers[name] = changed(old, a_CI=a_CI, b_OC=b_OC, own=own)
    return adapter.with_layers({name: layers[name] for name in adapter.layers})
