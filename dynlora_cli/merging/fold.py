"""Folds an adapter into its base: first a plan, which finds every fault, then files, one tensor at a time.

Shards, names, types and everything beside the weights stay as they are in the base's folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.base import expert_slices, module_of
from dynlora_cli.adapters.patches import Patch, folded, patched
from dynlora_cli.adapters.replaced import Replacement, lengthen, replacements, tied_names
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.whole import write_json
from dynlora_cli.merging.new_biases import BESIDE, with_biases
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.linear import is_linear, is_transposed, kind_of
from dynlora_cli.models.place import Place, tied
from dynlora_cli.models.weights import New, Space, Weights, write_like
from dynlora_cli.runs.folder import copy_tokenizer
from dynlora_cli.tasks import task as tasks

# What stands beside the weights and is of use to whoever runs the model.
KEPT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
Original = Callable[[str], Tensor]


@dataclass
class Plan:
    """What a merge will write; made by `plan_merge`.

    Attributes:
        layout: where the base's parameters lie in its files.
        config: of the merged model.
        changed: tensors of the base that become other ones.
        added: tensors that the base does not have.
        new: the names of `added`, by the names of their parameters in the model.
        modules: the adapted layers; the weight of each is in `changed` or `added`.
        untied: input table and output head shared a weight, and no longer do.
    """

    layout: Layout
    config: dict[str, Any]
    changed: dict[str, New] = field(default_factory=dict)
    added: dict[str, New] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    untied: bool = False

    @property
    def weights(self) -> Weights:
        """The base's files."""
        return self.layout.weights

    def tensor_names(self) -> list[str]:
        """Names of the merged model's tensors in its files."""
        return [*self.weights.entries, *self.added]

    def read(self, name: str) -> Tensor:
        """One tensor of the merged model's files, in fp32 where it was changed."""
        made = self.added.get(name) or self.changed.get(name)
        return made.make() if made else self.weights.read(name)

    def parameters(self) -> list[str]:
        """Names of the merged model's parameters in memory; of some that share a tensor, one."""
        return [name for name in self.layout.shapes if name in self.new or self.layout.holds(name)]

    def parameter(self, name: str) -> Tensor:
        """One of them, as `read` gives tensors."""
        return self.read(self.new[name]) if name in self.new else self.layout.read(name, self.read)


def plan_merge(
    adapter: Adapter,
    place: Place,
    original: Original | None = None,
    dtype: torch.dtype | None = None,
    others: Collection[str] = (),
) -> Plan:
    """Find for every part of the adapter what it changes in the base's files.

    Args:
        adapter: to be merged.
        place: its base.
        original: gives the weight to add to, by the layer's name: fp32, in the layer's own layout. None: the weight in
            the files.
        dtype: of the merged model; None: that of the base, tensor by tensor.
        others: layers that get the weight of `original`, too, whether or not they have components.

    Raises:
        UsageError: the base is another one, or stored in a form that cannot be added to.
    """
    model, switches = with_biases(place, adapter)
    config = read_object(place.folder / "config.json")
    if config.get("quantization_config"):
        raise UsageError(
            f"{place.folder} is stored quantized, and adding to it would quantize it once more",
            "name the model it was made from, --base FOLDER, or use `dynlora merge --base-weights dequantized`",
        )
    (config.get("text_config") or config).update(switches)
    plan = Plan(Layout(Weights(place.folder), model), config)
    folding = _Folding(adapter, model, plan, original)
    folding.zero_biases(switches)
    folding.layers()
    folding.experts()
    folding.replaced()
    folding.others(others)
    folding.twins()
    folding.finish()
    if dtype is not None:
        _convert(plan, dtype)
    if place.labels:
        _as_classifier(plan, model, place.labels)
    return plan


class _Folding:
    """Fills a plan, layer by layer."""

    def __init__(self, adapter: Adapter, model: PreTrainedModel, plan: Plan, original: Original | None) -> None:
        self.adapter, self.model, self.plan, self.original = adapter, model, plan, original
        self.layout = plan.layout
        self.tied = tied(model)
        self.given = replacements(model, adapter)
        lengthen(model, self.given)
        self.patches: dict[str, list[Patch]] = {}
        self.touched: set[str] = set()  # parameters that components are added to
        self.zeros: set[str] = set()  # biases that the base does not have

    def layers(self) -> None:
        for name, factors in self.adapter.layers.items():
            if not factors.experts:
                self._layer(name, factors, module_of(self.model, name, factors, self.adapter))
                self.plan.modules.append(name)

    def _layer(self, name: str, factors: Factors, module: nn.Module) -> None:
        parameter, conv1d = f"{name}.weight", is_transposed(module)
        if is_linear(module) and not getattr(kind_of(module), "as_stored", False):
            raise UsageError(
                f"{name} is a {type(module).__name__}, which does not multiply with the weight that its files hold",
                BESIDE,
            )
        found, given = self._found(parameter), self.given.get(parameter)
        base = self._original(name) if given is None else partial(self._given, given)
        self._untie_from(name)
        self.touched.add(parameter)
        if self.layout.holds(parameter) and not self._resized(parameter):
            self._patch(parameter, base, {0: factors}, conv1d)
            return
        read = base or partial(self._plain, parameter)
        shape = given.shape if given else self.layout.shapes[parameter]
        self._put(parameter, New(self._dtype(found), shape, lambda: folded(read(), factors, conv1d)))

    def _original(self, layer: str) -> Callable[[], Tensor] | None:
        return None if self.original is None else partial(self.original, layer)

    def _given(self, given: Replacement) -> Tensor:
        """A parameter that the adapter replaces, in fp32; a copy, since components are added in place."""
        return _copy(given.made(self._plain))

    def _plain(self, parameter: str) -> Tensor:
        """A parameter of the base, in fp32."""
        if parameter in self.zeros:
            return torch.zeros(self.layout.shapes[parameter])
        return self.layout.read(self._found(parameter), partial(self.plan.weights.read, dtype=torch.float32))

    def _resized(self, parameter: str) -> bool:
        return parameter in self.given and self.given[parameter].shape != self.layout.shapes[parameter]

    def _put(self, parameter: str, new: New) -> None:
        """A tensor as a whole, in the place of the base's or beside its others."""
        if self._resized(parameter):
            _grow(self.plan.config, self.layout.shapes[parameter], new.shape, parameter)
        if parameter in self.layout.whole:
            self.plan.changed[self.layout.whole[parameter]] = new
        elif parameter in self.layout.parts:
            raise UsageError(f"{self.plan.weights.folder} holds {parameter} in pieces, and it became longer", BESIDE)
        else:
            self._add(parameter, new)

    def _patch(
        self,
        parameter: str,
        base: Callable[[], Tensor] | None,
        factors: Mapping[int, Factors | None],
        conv1d: bool = False,
    ) -> None:
        """Change matrices of a parameter that is in the files, wherever they lie in them."""
        self._refuse_other_numbers(parameter)
        for part in self.layout.pieces(parameter):
            if part.own_matrix in factors:
                patch = Patch(part, factors[part.own_matrix], conv1d, base)
                self.patches.setdefault(part.tensor, []).append(patch)

    def _found(self, parameter: str) -> str:
        """The name under which the files have a parameter, see `Layout.find`."""
        found = self.layout.find(parameter)
        if found is not None:
            return found
        folder = self.plan.weights.folder
        if parameter in self.layout.unknown:
            raise UsageError(
                f"{folder} holds {parameter} in a form that cannot be added to: {self.layout.unknown[parameter]}",
                f"merge it in memory, with PEFT's merge_and_unload(), or {BESIDE}",
            )
        raise UsageError(f"{folder} has no tensor for the layer {parameter}", "is it another model?")

    def _refuse_other_numbers(self, parameter: str) -> None:
        for tensor in {part.tensor for part in self.layout.pieces(parameter)}:
            entry, expected = self.plan.weights.entries[tensor], self.layout.shapes[parameter]
            another = parameter in self.layout.whole and entry.shape != expected
            if another or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
                raise UsageError(
                    f"{entry.file}: {tensor} is {entry.dtype} {entry.shape}, the model has {expected}",
                    "name a base in fp32, bf16 or fp16 with --base FOLDER",
                )

    def _dtype(self, parameter: str) -> torch.dtype:
        """Of a parameter that is in the files."""
        return self.plan.weights.entries[self.layout.pieces(parameter)[0].tensor].dtype

    def zero_biases(self, switches: Collection[str]) -> None:
        """Biases of layers that have none in the base, where a switch gave them some; see new_biases.py."""
        for parameter, shape in self.layout.shapes.items() if switches else ():
            if parameter.endswith(".bias") and self.layout.find(parameter) is None:
                self.zeros.add(parameter)
                self._add(parameter, New(self._type_of_new(parameter), shape, partial(torch.zeros, shape)))

    def _type_of_new(self, bias: str) -> torch.dtype:
        return self._dtype(self._found(f"{bias.removesuffix('bias')}weight"))

    def experts(self) -> None:
        """Slices of experts, which no quantization of ours touches, and which may lie on disk each apart."""
        for parameter, slices in expert_slices(self.model, self.adapter).items():
            self._patch(self._found(parameter), None, slices)
        self.plan.modules += self.adapter.experts

    def replaced(self) -> None:
        """Parameters that the adapter replaces: a head, a table with other rows, biases."""
        for name, given in self.given.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module in self.adapter.layers:
                continue  # what the factors are added to
            if leaf == "weight" and not self._stay_tied(name):
                self._untie_from(module)
            if (
                self.layout.holds(name)
                and (name in self.layout.parts or given.whole is None)
                and not self._resized(name)
            ):
                matrices = range(len(self.layout.pieces(name)))
                self._patch(name, partial(self._given, given), dict.fromkeys(matrices))
                continue
            found = self.layout.find(name)
            if found is not None and found != name and self._stay_tied(name):
                continue  # another of the same numbers is in the files
            if name in self.zeros:
                dtype = self._type_of_new(name)
            elif found is None and given.whole is not None:
                dtype = given.whole.dtype
            else:
                dtype = self._dtype(self._found(name))
            self._put(name, New(dtype, given.shape, partial(self._given, given)))

    def _stay_tied(self, parameter: str) -> bool:
        """Whether all that share this one's numbers become the same, and no components are added to one of them."""
        names = tied_names(self.model, parameter)
        if any(name.removesuffix(".weight") in self.adapter.layers for name in names):
            return False
        return all(name in self.given and self.given[name].same(self.given[parameter]) for name in names)

    def others(self, layers: Collection[str]) -> None:
        """Layers without components whose weight is the original's, too."""
        for name in layers:
            if name not in self.adapter.layers and self.layout.holds(f"{name}.weight"):
                self._patch(f"{name}.weight", self._original(name), {0: None})

    def twins(self) -> None:
        """Give a parameter numbers of its own where it shared them with one that changes.

        Such are an input table and an output head, and the blocks that Zamba runs at several places with the same
        weights: components differ from place to place.
        """
        for parameter in self.layout.shapes:
            if self.layout.holds(parameter) or parameter in self.plan.new:
                continue
            found = self.layout.find(parameter)
            if found is None or parameter in self.given or not (self.plan.untied or found in self.touched):
                continue
            read = partial(self.layout.read, found, self.plan.weights.read)
            self._add(parameter, New(self._dtype(found), self.layout.shapes[parameter], read))

    def finish(self) -> None:
        space = Space()
        for tensor, patches in self.patches.items():
            self.plan.changed[tensor] = patched(self.plan.weights, tensor, patches, space)

    def _add(self, parameter: str, new: New) -> None:
        name = self.layout.name_of_new(parameter) if parameter in self.layout.shapes else parameter
        self.plan.added[name], self.plan.new[parameter] = new, name

    def _untie_from(self, module: str) -> None:
        """Where the model shares one weight between table and head, the two part here: both are written from now on."""
        if not self.tied or module not in self.tied:
            return
        self.plan.untied = True
        for config in (self.plan.config, self.plan.config.get("text_config") or {}):
            if config.get("tie_word_embeddings", True):
                config["tie_word_embeddings"] = False
        for parameter in (f"{name}.weight" for name in self.tied):
            if not self.layout.holds(parameter) and parameter not in self.plan.new:
                found = self._found(parameter)
                read = partial(self.layout.read, found, self.plan.weights.read)
                self._add(parameter, New(self._dtype(found), self.layout.shapes[parameter], read))


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


def _grow(config: dict[str, Any], old: tuple[int, ...], new: tuple[int, ...], name: str) -> None:
    """Take over a vocabulary that was enlarged in training."""
    owner = config if "vocab_size" in config else config.get("text_config") or {}
    if old[1:] != new[1:] or owner.get("vocab_size") not in (old[0], new[0]):
        raise UsageError(f"{name} is {new} in the adapter and {old} in the base", "is it another model?")
    owner["vocab_size"] = new[0]


def _as_classifier(plan: Plan, model: PreTrainedModel, labels: list[str]) -> None:
    plan.config["architectures"] = [type(model).__name__]
    plan.config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    plan.config["label2id"] = {label: index for index, label in enumerate(labels)}
    plan.config.pop("num_labels", None)
    if model.config.pad_token_id is not None:
        plan.config["pad_token_id"] = model.config.pad_token_id


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
    tasks.of(place.options).carry((adapter.folder, place.folder), folder)
    total = write_like(plan.weights, folder, changed, added)
    if len(merged) != len(changed) + len(added) or len(plan.modules) != len(adapter.layers):
        raise DynloraError(f"merged {len(merged)} of {len(changed) + len(added)} tensors", "please report this")
    return total
