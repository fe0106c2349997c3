"""Several adapters of one base into one adapter; no base needed, ranks may differ.

How they are combined is the method's business, a file of merging/methods/. Here is what holds for all of them: which
adapters go together, and the cut to a budget by singular values, with one threshold over all layers.

A method that works on the entries of an update makes one layer's update dense for a moment; the others never leave the
thin factors.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.config.options import given
from dynlora_cli.errors import UsageError
from dynlora_cli.merging.beside import bias_of, put_together, refuse_other_tokens, refuse_pair
from dynlora_cli.merging.images import refuse_other_pipeline
from dynlora_cli.merging.method import Parts, Way
from dynlora_cli.pruning.posthoc import Order, parameters_of
from dynlora_cli.text import natural_order

OVERSAMPLED = 16  # directions beyond those wanted, for the randomized SVD


@dataclass(frozen=True)
class Combined:
    """One adapter of several, and the share of the wanted update's ‖ΔW‖² that is in it."""

    adapter: Adapter
    energy_kept: float


def combine(adapters: Sequence[Adapter], way: Way) -> Combined:
    """Combine two or more adapters of the same base.

    Raises:
        UsageError: the adapters do not go together, or the budget is too small.
    """
    check(adapters)
    method = plugins.load("methods", way.method)
    if way.options is None:
        way = replace(way, options=given("methods", way.method, []))
    weights = _weights(adapters, way)
    largest = max(adapter.parameters for adapter in adapters)
    wanted = parameters_of(way.budget, adapters) if way.budget else largest
    generator, adds = torch.Generator().manual_seed(way.seed), bool(getattr(method, "adds", False))
    layers: dict[str, Factors] = {}
    energy = 0.0  # of what was wanted, before any cut
    for name in sorted({name for adapter in adapters for name in adapter.layers}, key=natural_order):
        parts = [(w, a.layers[name]) for w, a in zip(weights, adapters, strict=True) if name in a.layers]
        made = method.combine_layer(parts, way, generator)
        if isinstance(made, Tensor):
            layers[name] = _low_rank(made, parts, wanted)
            energy += made.double().square().sum().item()
        else:
            layers[name] = made
            energy += made.energy() ** 2
        kernel = parts[0][1].kernel
        layers[name] = replace(layers[name], bias_O=bias_of(parts, name, way.method, adds), kernel=kernel)
    beside = put_together(adapters, weights, way.method, adds)
    together = replace(beside, layers=layers, record=_record_of_base(adapters[0]), note=None)
    if (way.budget or not getattr(method, "lossless", False)) and together.parameters > wanted:
        together = _cut(together, wanted)
    elif getattr(method, "lossless", False):
        together = _with_births(together, adapters)
    kept = sum(factors.energy() ** 2 for factors in together.layers.values())
    return Combined(together, min(1.0, kept / energy) if energy else 1.0)


def _weights(adapters: Sequence[Adapter], way: Way) -> list[float]:
    """One for each adapter, as the method wants them."""
    weights = list(way.weights or [1.0] * len(adapters))
    if len(weights) != len(adapters):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters", "give one for each")
    own = getattr(plugins.load("methods", way.method), "weights", None)
    return own(weights) if own else weights


def _cut(adapter: Adapter, wanted: int) -> Adapter:
    """The adapter with its largest singular directions, of all layers together, in this many parameters."""
    order = Order.by_policy(adapter, plugins.load("policies", "magnitude"), None, None)
    if wanted < order.least:
        raise UsageError(f"--budget allows {wanted:,} parameters, one component needs {order.least:,}", "allow more")
    return order.cut(order.keep(wanted)[0])


def _with_births(together: Adapter, adapters: Sequence[Adapter]) -> Adapter:
    """With the births of components that stand side by side as they were; as it is, where any of them were changed.

    Histories that do not begin with a run of their own, or that an update was taken out of, are not put together.
    """
    changes = ("retired", "altered", "altered_births")
    if any(each.births[0]["old"] or any(each.record.get(key) for key in changes) for each in adapters):
        return together
    layers = {}
    for name, factors in together.layers.items():
        born = tuple(count for adapter in adapters for count in adapter.born(name))
        if sum(born) != factors.rank:  # turned, since there were more components than dimensions
            return together
        layers[name] = replace(factors, born=born)
    births = [birth for adapter in adapters for birth in adapter.births]
    return replace(together, layers=layers, record={**together.record, "births": births})


def _record_of_base(adapter: Adapter) -> dict[str, Any]:
    """What is on record of the base, and of how training loaded it."""
    kept = {key: adapter.record[key] for key in ("base_model", "tokens") if key in adapter.record}
    options = (adapter.record.get("recipe") or {}).get("model")
    return kept | ({"recipe": {"model": options}} if options else {})


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that do not belong together.

    Raises:
        UsageError: a DoRA or HiRA, components for each expert, another base or task, layers of other shapes, heads that
            differ.
    """
    first = adapters[0]
    if not any(adapter.layers for adapter in adapters):
        raise UsageError(
            f"{first.folder} and the others have no layers to combine", "merge them into the base, one by one"
        )
    for adapter in adapters:
        if adapter.kind != "LoRA":
            raise UsageError(
                f"{adapter.folder} is a {adapter.kind}, whose updates cannot be added",
                "merge it into its base instead: dynlora merge --adapter FOLDER --into base",
            )
        if adapter.experts:
            raise UsageError(
                f"{adapter.folder} has components for each expert, which are not combined yet",
                "merge it into its base instead: dynlora merge --adapter FOLDER --into base",
            )
    for other in adapters[1:]:
        _refuse_pair(first, other)
    refuse_other_tokens(adapters)
    tables = [name for adapter in adapters for name, factors in adapter.layers.items() if factors.embedding]
    if tables and any(adapter.has_lora_bias for adapter in adapters):
        raise UsageError(
            f"one adapter adapts the table {tables[0]} and another adds biases (lora_bias), which PEFT does not have "
            "together",
            "merge one into its base first: dynlora merge --adapter FOLDER --into base",
        )


def _refuse_pair(first: Adapter, other: Adapter) -> None:
    """Refuse two adapters of different bases or tasks, whose layers have other shapes, or whose heads differ."""
    if not _same_base(first, other) or other.task != first.task:
        raise UsageError(
            f"{first.folder} and {other.folder} are of different bases or tasks: "
            f"{_base_name(first)} ({first.task}) and {_base_name(other)} ({other.task})"
        )
    for name in first.layers.keys() & other.layers.keys():
        if first.layers[name].shape != other.layers[name].shape:
            raise UsageError(
                f"{first.folder} and {other.folder}: the layer {name} has different shapes",
                "they are of different bases, though their layers have the same names; merge adapters of one base",
            )
    refuse_pair(first, other)
    refuse_other_pipeline(first, other)


def _same_base(first: Adapter, other: Adapter) -> bool:
    """By the fingerprints of the weights, or by name where another tool's adapter has none."""
    one, two = ((each.record.get("base_model") or {}).get("fingerprint") or {} for each in (first, other))
    shared = [key for key in ("sha256", "sampled_sha256") if key in one and key in two]
    if shared:
        return all(one[key] == two[key] for key in shared)
    return _base_name(first) == _base_name(other)


def _base_name(adapter: Adapter) -> str:
    """The base's name on the hub, or its folder."""
    name = str(adapter.config.get("base_model_name_or_path"))
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def _low_rank(delta_OI: Tensor, parts: Parts, wanted: int) -> Factors:
    """The best factors of a dense update, with no more components than could stay."""
    most = min(min(delta_OI.shape), max(sum(f.rank for _, f in parts), wanted // sum(delta_OI.shape) + 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, sigma, v = torch.svd_lowrank(delta_OI, q=min(min(delta_OI.shape), most + OVERSAMPLED), niter=4)
    u, sigma, v = u[:, :most], sigma[:most], v[:, :most]
    root = sigma.sqrt()
    return Factors((v * root).T.contiguous(), u * root, embedding=parts[0][1].embedding)
