"""Folds an adapter into its base: first a plan, which finds every fault, then files, one tensor at a time.

    W' = W + ΔW                                   LoRA; Conv1D and embedding tables in their own layout
    W' = m · (W + ΔW) / ‖W + ΔW‖                  DoRA
    W' = W ∘ (1 + ΔW)                             HiRA

Shards, types and everything beside the weights stay as they are in the base's folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from dynlora_cli.adapter import Adapter, Factors
from dynlora_cli.adapter_base import Place, module_of, structure, tied
from dynlora_cli.errors import DynloraError, MeasureError, UsageError
from dynlora_cli.experts import parameter_of, parts_of, split
from dynlora_cli.foreign import read_object
from dynlora_cli.run_folder import copy_tokenizer
from dynlora_cli.weights import New, Space, Weights, write_like
from dynlora_cli.whole_files import write_json

# What stands beside the weights and is of use to whoever runs the model.
KEPT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
Original = Callable[[str, str], Tensor]


@dataclass
class Plan:
    """What a merge will write; made by `plan_merge`.

    Attributes:
        changed: tensors of the base that become other ones.
        added: tensors that the base does not have.
        names: new names of the base's tensors.
        config: of the merged model.
        modules: adapted layers; each is in `changed` or `added`.
        untied: input table and output head shared a weight, and no longer do.
    """

    weights: Weights
    config: dict[str, Any]
    changed: dict[str, New] = field(default_factory=dict)
    added: dict[str, New] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    untied: bool = False

    def tensor_names(self) -> list[str]:
        """Names of the merged model's tensors."""
        return [*(self.names.get(name, name) for name in self.weights.entries), *self.added]

    def read(self, name: str) -> Tensor:
        """One tensor of the merged model, in fp32 where it was changed."""
        old = next((old for old, new in self.names.items() if new == name), name)
        made = self.added.get(name) or self.changed.get(old)
        return made.make() if made else self.weights.read(old)


def plan_merge(
    adapter: Adapter, place: Place, original: Original | None = None, dtype: torch.dtype | None = None
) -> Plan:
    """Find for every part of the adapter what it changes in the base's files.

    Args:
        adapter: to be merged.
        place: its base.
        original: gives a tensor of the base by (tensor name, module name) in fp32 and in the file's layout, where it is
            not what the files hold; by default it is.
        dtype: of the merged model; None: that of the base, tensor by tensor.

    Raises:
        UsageError: the base is another one, or stored in a form that cannot be added to.
    """
    weights = Weights(place.folder)
    model = structure(place)
    if adapter.experts:
        split(model)
    config = read_object(place.folder / "config.json")
    if config.get("quantization_config"):
        raise UsageError(
            f"{place.folder} is stored quantized, and adding to it would quantize it once more",
            "name the model it was made from: --base FOLDER",
        )
    plan = Plan(weights, config)
    folding = _Folding(adapter, model, plan, original)
    folding.layers()
    folding.experts()
    folding.replaced()
    if dtype is not None:
        _convert(plan, dtype)
    if place.labels:
        _as_classifier(plan, model, place.labels)
    plan.names = _full_names(weights, model) if plan.added else {}
    return plan


class _Folding:
    """Fills a plan, layer by layer."""

    def __init__(self, adapter: Adapter, model: PreTrainedModel, plan: Plan, original: Original | None) -> None:
        self.adapter, self.model, self.plan, self.original = adapter, model, plan, original
        self.tied = tied(model)
        self.space = Space()

    def layers(self) -> None:
        for name, factors in self.adapter.layers.items():
            module = module_of(self.model, name, factors, self.adapter)
            if factors.experts:
                continue
            tensor = self._tensor(name)
            entry = self.plan.weights.entries[tensor]
            expected = tuple(module.get_parameter("weight").shape)
            if entry.shape != expected or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
                raise UsageError(
                    f"{entry.file}: {tensor} is {entry.dtype} {entry.shape}, the model has {expected}",
                    "name a base in fp32, bf16 or fp16 with --base FOLDER",
                )
            self._put(name, self._changed(name, tensor, factors, isinstance(module, Conv1D)))
            self.plan.modules.append(name)

    def _changed(self, name: str, tensor: str, factors: Factors, transposed: bool) -> New:
        """A layer's new weight; from the files as they are, rows can be made alone."""
        weights, whole = self.plan.weights, self.adapter.whole.get(f"{name}.weight")
        entry = weights.entries[tensor]
        if whole is not None:
            return New(entry.dtype, entry.shape, lambda: folded(_copy(whole), factors, transposed))
        if self.original is not None:
            base = partial(self.original, tensor, name)
            return New(entry.dtype, entry.shape, lambda: folded(base(), factors, transposed))

        def rows(first: int, last: int, space: Space | None = self.space) -> Tensor:
            W = weights.read(tensor, torch.float32, (first, last), space)
            return folded(W, rows_of(factors, transposed, first, last), transposed)

        # DoRA's norms are over the rows of a transposed weight.
        alone = not transposed or factors.magnitude_O is None
        return New(entry.dtype, entry.shape, lambda: rows(0, entry.shape[0], None), rows if alone else None)

    def experts(self) -> None:
        """Slices of experts, which no quantization of ours touches, and which lie on disk in pieces of their own."""
        groups: dict[str, dict[int, Factors]] = {}
        for name, factors in self.adapter.layers.items():
            if factors.experts:
                groups.setdefault(parameter_of(name), {})[parts_of(name)[1]] = factors
                self.plan.modules.append(name)
        weights = self.plan.weights
        for parameter, slices in groups.items():
            for tensor, starts in stored_rows(self.model, parameter, weights).items():
                if any(expert in slices for expert, _ in starts):
                    entry, base = weights.entries[tensor], partial(weights.read, tensor, torch.float32)
                    make = partial(folded_experts, base, slices, starts)
                    self.plan.changed[tensor] = New(entry.dtype, entry.shape, make)

    def replaced(self) -> None:
        """Tensors that were trained whole: a head, embeddings with more tokens."""
        for name, tensor in self.adapter.whole.items():
            module, _, leaf = name.rpartition(".")
            if module in self.adapter.layers:
                continue  # what the factors are added to
            new = New(tensor.dtype, tuple(tensor.shape), partial(_given, tensor))
            found = self.plan.weights.locate(module, leaf)
            if found is not None or self._is_tied_head(module):
                old = self.plan.weights.entries[found or self._tensor(module)]
                new = New(old.dtype, new.shape, new.make)
                if new.shape != old.shape:
                    _grow(self.plan.config, old.shape, new.shape, name)
            self._put(module, new, leaf)

    def _is_tied_head(self, module: str) -> bool:
        return self.tied is not None and module == self.tied[1]

    def _tensor(self, module: str) -> str:
        """The tensor in which a module's weight lies."""
        source = self.tied[0] if self.tied and self._is_tied_head(module) else module
        found = self.plan.weights.locate(source)
        if found is None:
            raise UsageError(f"{self.plan.weights.folder} has no tensor for the layer {module}", "is it another model?")
        return found

    def _put(self, module: str, new: New, leaf: str = "weight") -> None:
        """Where the model shares one weight between table and head, the two part here."""
        if self.tied and module in self.tied and leaf == "weight":
            self._untie()
        found = self.plan.weights.locate(module, leaf)
        if found is not None:
            self.plan.changed[found] = new
        else:
            self.plan.added[f"{module}.{leaf}"] = new

    def _untie(self) -> None:
        assert self.tied is not None
        self.plan.untied = True
        for config in (self.plan.config, self.plan.config.get("text_config") or {}):
            if config.get("tie_word_embeddings", True):
                config["tie_word_embeddings"] = False
        head, table = f"{self.tied[1]}.weight", self._tensor(self.tied[0])
        if self.plan.weights.locate(self.tied[1]) is None and head not in self.plan.added:
            entry = self.plan.weights.entries[table]
            self.plan.added[head] = New(entry.dtype, entry.shape, partial(self.plan.weights.read, table))


def rows_of(factors: Factors, transposed: bool, first: int, last: int) -> Factors:
    """What changes these rows of a weight in the layout of the file."""
    if transposed:
        return replace(factors, a_CI=factors.a_CI[:, first:last])
    magnitude_O = None if factors.magnitude_O is None else factors.magnitude_O[first:last]
    return replace(factors, b_OC=factors.b_OC[first:last], magnitude_O=magnitude_O)


def folded(W: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """W' in the place of W, fp32 and in the layout of the file: [O, I], or [I, O] for Conv1D."""
    view = W.T if transposed else W
    if factors.hadamard:
        view.addcmul_(view, factors.delta_OI())
    else:
        view.addmm_(factors.b_OC, factors.a_CI)
    if factors.magnitude_O is not None:
        view.mul_((factors.magnitude_O / view.norm(dim=1)).unsqueeze(1))
    return _finite(W)


def folded_experts(base: Callable[[], Tensor], slices: Mapping[int, Factors], starts: list[tuple[int, int]]) -> Tensor:
    """W' in fp32 of a tensor with rows of experts, see `stored_rows`."""
    W = base()
    for matrix, (expert, row) in zip(W.view(-1, *W.shape[-2:]), starts, strict=True):
        if expert in slices:
            matrix.addmm_(slices[expert].b_OC[row : row + len(matrix)], slices[expert].a_CI)
    return _finite(W)


def _finite(W: Tensor) -> Tensor:
    if not all(extreme.isfinite() for extreme in W.aminmax()):
        raise MeasureError("a merged weight is not finite", "look at the base's and the adapter's numbers")
    return W


def stored_rows(model: PreTrainedModel, parameter: str, weights: Weights) -> dict[str, list[tuple[int, int]]]:
    """The tensors of the files that hold a parameter of experts [E, O, I], and for each matrix in them the expert and
    the row of its slice that it begins with.

    A file holds the parameter as it is, or each expert apart, with gate and up apart as well. transformers knows how,
    and saves any tensor of this name so; here one that numbers all rows, in two columns, since 5.20 drops a lone one.

    Raises:
        UsageError: the files hold it in no such form.
    """
    experts, rows, inputs = model.get_parameter(parameter).shape
    numbers = torch.arange(experts * rows).view(experts, rows, 1).repeat(1, 1, 2)
    as_it_is = weights.locate(*parameter.rpartition(".")[::2]) is not None
    pieces = {parameter: numbers} if as_it_is else revert_weight_conversion(model, {parameter: numbers})
    found = {}
    for name, piece in pieces.items():
        tensor = weights.locate(*name.rpartition(".")[::2])
        entry = weights.entries[tensor] if tensor else None
        consecutive = bool((piece.diff(dim=-2) == 1).all())
        if tensor is None or entry is None or entry.shape != (*piece.shape[:-1], inputs) or not consecutive:
            raise UsageError(
                f"{weights.folder} holds {parameter} in a form that cannot be added to: {name}",
                "use the adapter beside the base, without merging it",
            )
        found[tensor] = [divmod(int(matrix[0]), rows) for matrix in piece[..., 0].reshape(-1, piece.shape[-2])]
    return found


def _convert(plan: Plan, dtype: torch.dtype) -> None:
    """Let every number of the model have this type."""
    for name, entry in plan.weights.entries.items():
        if entry.dtype.is_floating_point:
            old = plan.changed.get(name)
            plan.changed[name] = replace(old or New(dtype, entry.shape, partial(plan.weights.read, name)), dtype=dtype)
    plan.added = {name: replace(new, dtype=dtype) for name, new in plan.added.items()}
    for key in {"dtype", "torch_dtype"} & plan.config.keys() or {"dtype"}:
        plan.config[key] = str(dtype).removeprefix("torch.")


def _copy(tensor: Tensor) -> Tensor:
    """In fp32; a copy, since the update is added in place."""
    return tensor.to(torch.float32, copy=True)


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _grow(config: dict[str, Any], old: tuple[int, ...], new: tuple[int, ...], name: str) -> None:
    """Take over a vocabulary that was enlarged in training."""
    if old[1:] != new[1:] or config.get("vocab_size") not in (old[0], new[0]):
        raise UsageError(f"{name} is {new} in the adapter and {old} in the base", "is it another model?")
    config["vocab_size"] = new[0]


def _as_classifier(plan: Plan, model: PreTrainedModel, labels: list[str]) -> None:
    plan.config["architectures"] = [type(model).__name__]
    plan.config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    plan.config["label2id"] = {label: index for index, label in enumerate(labels)}
    plan.config.pop("num_labels", None)
    if model.config.pad_token_id is not None:
        plan.config["pad_token_id"] = model.config.pad_token_id


def _full_names(weights: Weights, model: PreTrainedModel) -> dict[str, str]:
    """For a model that was saved without its prefix and now has a head beside it: its names with the prefix."""
    prefix, known = model.base_model_prefix, set(model.state_dict())
    return {name: f"{prefix}.{name}" for name in weights.entries if name not in known and f"{prefix}.{name}" in known}


def write_merged(plan: Plan, adapter: Adapter, place: Place, folder: Path) -> int:
    """Write the merged model into an existing folder; returns the bytes of its tensors.

    Raises:
        DynloraError: not every layer of the adapter was merged.
    """
    merged: set[str] = set()

    def counted(name: str, new: New) -> New:
        def make() -> Tensor:
            merged.add(name)
            return new.make()

        def rows(first: int, last: int) -> Tensor:
            merged.add(name)
            assert new.rows is not None
            return new.rows(first, last)

        return replace(new, make=make, rows=rows if new.rows else None)

    changed = {name: counted(name, new) for name, new in plan.changed.items()}
    added = {name: counted(name, new) for name, new in plan.added.items()}
    for pattern in KEPT_FILES:
        for path in place.folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    copy_tokenizer(adapter.folder, folder)  # as it was when the adapter was trained, template included
    write_json(folder / "config.json", plan.config)
    total = write_like(plan.weights, folder, changed, added, renamed=lambda name: plan.names.get(name, name))
    if len(merged) != len(changed) + len(added) or len(plan.modules) != len(adapter.layers):
        raise DynloraError(f"merged {len(merged)} of {len(changed) + len(added)} tensors", "please report this")
    return total
