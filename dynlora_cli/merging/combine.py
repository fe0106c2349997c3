"""Several adapters of one base into one adapter; no base needed, ranks may differ.

    exact     the weighted sum of the updates; factors are put side by side, nothing is lost
    svd       the same sum, cut to a budget
    linear    the weighted mean (weights divided by their sum), cut to a budget
    ties      small entries of each update dropped, signs elected, what agrees averaged (Yadav et al. 2023, 2306.01708)
    dare      entries of each update dropped by lot, the rest made larger, then the sum (Yu et al. 2023, 2311.03099)

The cut is by singular values, one threshold over all layers. ties and dare work on entries, so each layer's update is
made dense for a moment; the others never leave the thin factors.

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
from dynlora_cli.config.budget import Budget
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.pruning.posthoc import Order, parameters_of
from dynlora_cli.text import natural_order

METHODS = ("exact", "linear", "ties", "dare", "svd")
OVERSAMPLED = 16  # directions beyond those wanted, for the randomized SVD


@dataclass(frozen=True)
class Way:
    """How adapters are combined.

    Attributes:
        method: see the top of this file.
        weights: one for each adapter; None: 1 each.
        budget: of the result, as in a recipe; a share is of all adapters together; None: what the largest adapter
            holds, and for exact what it takes.
        density: share of the entries that ties and dare keep.
        seed: of dare.
    """

    method: str = "exact"
    weights: Sequence[float] | None = None
    budget: Budget | None = None
    density: float = 0.5
    seed: int = 0


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
    weights, method = list(way.weights or [1.0] * len(adapters)), way.method
    if len(weights) != len(adapters):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters", "give one for each")
    if method == "linear":
        total = sum(weights)
        if total == 0:
            raise UsageError("--weights sum to 0, and linear divides by their sum", "use --method svd")
        weights = [weight / total for weight in weights]
    names = sorted({name for adapter in adapters for name in adapter.layers}, key=natural_order)
    largest = max(adapter.parameters for adapter in adapters)
    wanted = parameters_of(way.budget, adapters) if way.budget else largest
    generator = torch.Generator().manual_seed(way.seed)
    layers: dict[str, Factors] = {}
    energy = 0.0  # of what was wanted, before any cut
    for name in names:
        parts = [(w, a.layers[name]) for w, a in zip(weights, adapters, strict=True) if name in a.layers]
        if method in ("ties", "dare"):
            dense = _ties(parts, way.density) if method == "ties" else _dare(parts, way.density, generator)
            layers[name] = _low_rank(dense, parts, wanted)
            energy += dense.double().square().sum().item()
        else:
            layers[name] = _side_by_side(parts)
            energy += layers[name].energy() ** 2
    together = replace(adapters[0], layers=layers, record=_record_of_base(adapters[0]), note=None)
    if (method != "exact" or way.budget) and together.parameters > wanted:
        order = Order.by_policy(together, plugins.load("policies", "magnitude"), None, None)
        if wanted < order.least:
            raise UsageError(
                f"--budget allows {wanted:,} parameters, one component needs {order.least:,}", "allow more"
            )
        together = order.cut(order.keep(wanted)[0])
    kept = sum(factors.energy() ** 2 for factors in together.layers.values())
    return Combined(together, min(1.0, kept / energy) if energy else 1.0)


def _record_of_base(adapter: Adapter) -> dict[str, Any]:
    """What is on record of the base, and of how training loaded it."""
    kept = {key: adapter.record[key] for key in ("base_model",) if key in adapter.record}
    options = (adapter.record.get("recipe") or {}).get("model")
    return kept | ({"recipe": {"model": options}} if options else {})


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that do not belong together.

    Raises:
        UsageError: a DoRA or HiRA, components for each expert, another base or task, layers of other shapes, heads that
            differ.
    """
    first = adapters[0]
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
        if not _same_base(first, other) or other.task != first.task:
            raise UsageError(
                f"{first.folder} and {other.folder} are of different bases or tasks: "
                f"{_base_name(first)} ({first.task}) and {_base_name(other)} ({other.task})"
            )
        for name in first.layers.keys() & other.layers.keys():
            if first.layers[name].cost != other.layers[name].cost:
                raise UsageError(f"{first.folder} and {other.folder}: the layer {name} has different shapes")
        same = first.whole.keys() == other.whole.keys() and all(
            first.whole[key].shape == other.whole[key].shape and torch.equal(first.whole[key], other.whole[key])
            for key in first.whole
        )
        if not same:
            raise UsageError(
                f"{first.folder} and {other.folder} have heads or embeddings of their own, which cannot be added",
                "combine adapters without them, or merge one into its base",
            )


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


def _side_by_side(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Σ w B A as one pair of factors; in SVD form where that needs fewer components."""
    a = torch.cat([factors.a_CI for _, factors in parts])
    b = torch.cat([weight * factors.b_OC for weight, factors in parts], 1)
    if a.shape[0] > min(a.shape[1], b.shape[0]):
        a, b = svd_factors(a, b)
    return Factors(a, b, embedding=parts[0][1].embedding)


def _ties(parts: Sequence[tuple[float, Factors]], density: float) -> Tensor:
    """Trim, elect signs, and add what agrees, divided by the weights of those that agree. [O, I]"""
    trimmed = []
    for weight, factors in parts:
        delta = factors.delta_OI()
        keep = max(1, round(density * delta.numel()))
        smallest = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
        trimmed.append((weight, torch.where(delta.abs() >= smallest, delta, 0.0)))
    sign = sum(weight * delta for weight, delta in trimmed).sign()  # type: ignore[union-attr]
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, delta in trimmed:
        agrees = ((weight * delta).sign() == sign) & (delta != 0)
        total += torch.where(agrees, weight * delta, 0.0)
        agreeing += torch.where(agrees, abs(weight), 0.0)
    return total / agreeing.clamp_min(torch.finfo(total.dtype).tiny)


def _dare(parts: Sequence[tuple[float, Factors]], density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density` and is divided by it. [O, I]"""
    total = torch.zeros(parts[0][1].b_OC.shape[0], parts[0][1].a_CI.shape[1])
    for weight, factors in parts:
        stays = torch.rand(total.shape, generator=generator) < density
        total += torch.where(stays, factors.delta_OI() * (weight / density), 0.0)
    return total


def _low_rank(delta_OI: Tensor, parts: Sequence[tuple[float, Factors]], wanted: int) -> Factors:
    """The best factors of a dense update, with no more components than could stay."""
    most = min(min(delta_OI.shape), max(sum(f.rank for _, f in parts), wanted // sum(delta_OI.shape) + 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, sigma, v = torch.svd_lowrank(delta_OI, q=min(min(delta_OI.shape), most + OVERSAMPLED), niter=4)
    u, sigma, v = u[:, :most], sigma[:most], v[:, :most]
    root = sigma.sqrt()
    return Factors((v * root).T.contiguous(), u * root, embedding=parts[0][1].embedding)
