"""`dynlora inspect`: what an adapter is made of, and two of them side by side. Reads factors only; no base, no data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.find import HYPERNET_WEIGHTS, find_adapter, is_hypernet
from dynlora_cli.adapters.read import kind_of_files, read_adapter
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.text import natural_order

_SIZES = ("components", "parameters")
# What files of kohya's and others say of their training, by the words it is shown with here.
_SAID = {
    "base_model": ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version"),
    "trained_as": ("ss_network_module",),
    "title": ("modelspec.title", "ss_output_name"),
}
LONGEST_SAID = 200  # characters
SHOWN_OF_SPECTRUM = (0.5, 0.9, 0.99)  # for these shares of ‖ΔW‖² the number of directions is shown


def run(paths: Sequence[Path]) -> dict[str, Any]:
    """Describe one adapter or two.

    Args:
        paths: run folders or PEFT LoRA folders.

    Returns:
        `adapters`, one description each, and with two of them `comparison`.

    Raises:
        UsageError, MeasureError: one of them cannot be read.
    """
    if (networks := [is_hypernet(find_adapter(path)[0]) for path in paths]) and any(networks):
        if len(networks) > 1:
            raise UsageError("a network that writes adapters has no update to compare", "inspect them one by one")
        return {"ok": True, "command": "inspect", "adapters": [_hypernet(paths[0])], "notes": []}
    adapters = [read_adapter(path, routed=True, images=True) for path in paths]
    if any(isinstance(adapter, RoutedAdapter) for adapter in adapters) and len(adapters) > 1:
        raise UsageError("a router has no update of its own to be put beside another", "inspect them one by one")
    found: dict[str, Any] = {
        "ok": True,
        "command": "inspect",
        "adapters": [describe(adapter) for adapter in adapters],
        "notes": [adapter.note for adapter in adapters if adapter.note],
    }
    if len(adapters) == 2:
        found["comparison"] = compare(*adapters)
    return found


def describe(adapter: Adapter) -> dict[str, Any]:
    """Ranks, sizes, energies, spectra and where it comes from; of a router its adapters and its numbers."""
    if isinstance(adapter, RoutedAdapter):
        return _router(adapter)
    values = {name: factors.singular_values_C() for name, factors in adapter.layers.items()}
    layers = {name: _layer(factors, values[name], list(adapter.born(name))) for name, factors in adapter.layers.items()}
    recorded = adapter.record.get("layers") or {}
    nothing = [0] * len(adapter.births)
    gone = {
        name: _layer(_none(layer["d_in"], layer["d_out"]), torch.zeros(0), nothing)
        for name, layer in recorded.items()
        if name not in layers
    }
    return {
        "name": adapter.name,
        "folder": str(adapter.folder),
        "kind": getattr(plugins.load("kinds", kind_of_files(adapter.config)), "read_as", adapter.kind),
        "task": adapter.task,
        "parameters": adapter.parameters,
        "components": adapter.components,
        "average_rank": _average_rank(adapter, recorded),
        "bytes": sum(file.stat().st_size for file in _files(adapter)),
        **({"rank_by_timestep": adapter.schedule.as_dict()} if adapter.schedule else {}),
        **({"file_form": adapter.file_form, "dtype": adapter.image.dtype} if adapter.image else {}),
        **({"parts": _parts(adapter)} if adapter.image else {}),
        "whole_tensors": {name: list(tensor.shape) for name, tensor in adapter.whole.items()},
        "biases": adapter.biases,
        "lora_bias": sum(factors.bias_O is not None for factors in adapter.layers.values()),
        "token_rows": {name: list(rows.indices) for name, rows in adapter.token_rows.items()},
        "token_texts": _token_texts(adapter),
        "directions": _directions(list(values.values())),
        "births": _births(adapter),
        "layers": dict(sorted((layers | gone).items(), key=lambda item: natural_order(item[0]))),
        "provenance": _provenance(adapter),
    }


def _files(adapter: Adapter) -> list[Path]:
    """The files of its tensors."""
    return [adapter.folder] if adapter.image else list(adapter.folder.glob("adapter*.safetensors"))


def _parts(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """What an adapter of a pipeline has in each part of it."""
    found: dict[str, dict[str, Any]] = {}
    for name, factors in adapter.layers.items():
        part = found.setdefault(name.partition(".")[0], dict.fromkeys(("layers", "convolutions", *_SIZES), 0))
        part["layers"] += 1
        part["convolutions"] += bool(factors.kernel)
        part["components"] += factors.rank
        part["parameters"] += factors.parameters
    return found


def _token_texts(adapter: Adapter) -> dict[int, str]:
    """The tokens that it has rows of, by number, as far as its record or the tokenizer beside it knows them."""
    numbers = {number for rows in adapter.token_rows.values() for number in rows.indices}
    tokens = adapter.record.get("tokens")
    new = tokens.get("new") if isinstance(tokens, dict) else None
    path = adapter.folder / "tokenizer.json"
    if not isinstance(new, list):
        added = read_object(path).get("added_tokens") if numbers and path.is_file() else None
        new = [{"number": t.get("id"), "text": t.get("content")} for t in added or () if isinstance(t, dict)]
    found = {token.get("number"): str(token.get("text")) for token in new if isinstance(token, dict)}
    return {number: found[number] for number in sorted(numbers) if number in found}


def _router(adapter: RoutedAdapter) -> dict[str, Any]:
    """What a router is made of."""
    members = [
        {
            "name": name,
            "kind": member.kind,
            "off": name in adapter.off,
            "parameters": member.parameters,
            "components": member.components,
            "layers": len(member.layers),
        }
        for name, member in adapter.members.items()
    ]
    tensors = {
        name: {"shape": list(tensor.shape), "norm": float(tensor.double().norm())}
        for name, tensor in sorted(adapter.tensors.items(), key=lambda item: natural_order(item[0]))
    }
    files = [*adapter.folder.glob("*.safetensors"), *adapter.folder.glob("adapters/*/*.safetensors")]
    return {
        "name": adapter.name,
        "folder": str(adapter.folder),
        "kind": adapter.kind,
        "task": adapter.task,
        "method": adapter.method,
        "options": dict(adapter.options),
        "parameters": adapter.parameters,
        "router_parameters": adapter.own_parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "adapters": members,
        "router": tensors,
        "provenance": {key: value for key, value in _provenance(adapter).items() if key != "scaling"},
    }


def _hypernet(path: Path) -> dict[str, Any]:
    """What a network that writes adapters is, and for whom."""
    found = read_hypernet(find_adapter(path)[0])
    form = found.form
    largest = sum(layer.rank * (layer.d_in + layer.d_out) for layer in form.layers)
    return {
        "name": found.folder.resolve().name,
        "folder": str(found.folder),
        "kind": f"{form.method} hypernetwork, which writes adapters",
        "method": form.method,
        "options": form.options,
        "parameters": form.parameters,
        "bytes": (found.folder / HYPERNET_WEIGHTS).stat().st_size,
        "reads": plugins.declared("hypernets", form.method, "READS"),
        "encoder": form.encoder and form.encoder.name,
        "written_parameters": largest,
        "budget_parameters": form.budget,
        "hypernet": {layer.name: [layer.d_out, layer.d_in, layer.rank] for layer in form.layers},
        "provenance": {"base": form.base.name_or_path, "revision": form.base.revision},
    }


def _births(adapter: Adapter) -> list[dict[str, Any]]:
    """The runs that the components began in, oldest first, and how much is left of each."""
    found = []
    for index, birth in enumerate(adapter.births):
        parts = [_of_birth(factors, adapter.born(name), index) for name, factors in adapter.layers.items()]
        size = {
            "components": sum(part.rank for part in parts),
            "parameters": sum(part.parameters for part in parts),
            "energy": math.sqrt(sum(part.energy() ** 2 for part in parts)),
        }
        found.append({**birth, **size})
    return found


def _of_birth(factors: Factors, born: tuple[int, ...], index: int) -> Factors:
    first = sum(born[:index])
    place = torch.arange(factors.rank)
    return factors.keep((place >= first) & (place < first + born[index]))


def _layer(factors: Factors, values: Tensor, born: list[int]) -> dict[str, Any]:
    return {
        "rank": factors.rank,
        "born": born,
        "d_in": factors.a_CI.shape[1],
        "d_out": factors.b_OC.shape[0],
        "parameters": factors.parameters,
        "energy": float(values.square().sum().sqrt()),
        "spectrum": [float(value) for value in values],
    }


def _none(d_in: int, d_out: int) -> Factors:
    """A layer that was pruned to nothing."""
    return Factors(torch.zeros(0, d_in), torch.zeros(d_out, 0))


def _average_rank(adapter: Adapter, recorded: dict[str, Any]) -> float:
    """Parameters over Σ(d_in + d_out) of all layers that training had, as of a budget."""
    costs = {name: layer["d_in"] + layer["d_out"] for name, layer in recorded.items()}
    costs |= {name: factors.cost for name, factors in adapter.layers.items()}
    return adapter.parameters / sum(costs.values()) if costs else 0.0


def _directions(spectra: Sequence[Tensor]) -> dict[str, int]:
    """How many singular directions, the largest of all layers first, hold a share of the whole ‖ΔW‖²."""
    energies = sorted((float(value) ** 2 for values in spectra for value in values), reverse=True)
    total, found = sum(energies), {}
    for share in SHOWN_OF_SPECTRUM:
        running, number = 0.0, 0
        while number < len(energies) and running < share * total:
            running += energies[number]
            number += 1
        found[f"{100 * share:g}%"] = number
    return found


def _provenance(adapter: Adapter) -> dict[str, Any]:
    record, config = adapter.record, adapter.config
    base = record.get("base_model") or {}
    made = {
        "tool": f"dynlora {record['dynlora_version']}" if "dynlora_version" in record else _tool(adapter),
        "peft_version": config.get("peft_version"),
        "base_model": base.get("name_or_path") or config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "fingerprint": (base.get("fingerprint") or {}).get("sha256"),
        "data_sha256": (record.get("data") or {}).get("sha256"),
        "seed": (record.get("seeds") or {}).get("seed"),
        "device": record.get("device"),
        "finished": record.get("finished"),
        "documents": _documents(record),
        "written_by": _written_by(record),
        "pruned": record.get("prune"),
        "scaling": None if adapter.image else {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora")},
    }
    if adapter.image:
        for key, names in _SAID.items():
            said = next((adapter.image.metadata[name] for name in names if adapter.image.metadata.get(name)), None)
            made[key] = made.get(key) or (said[:LONGEST_SAID] if said else None)
    return {key: value for key, value in made.items() if value is not None}


def _tool(adapter: Adapter) -> str | None:
    """What wrote its files, where it was not us; None: nobody says."""
    if adapter.image is None:
        return "PEFT"
    return "kohya's scripts" if any(key.startswith("ss_") for key in adapter.image.metadata) else None


def _documents(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """The documents that it was made from; None: of none."""
    made_by = record.get("adapted") or record.get("written") or {}
    return [{"name": one["name"], "sha256": one["sha256"]} for one in made_by.get("documents") or ()] or None


def _written_by(record: dict[str, Any]) -> dict[str, Any] | None:
    """The hypernetwork that wrote it, and the description that it wrote from; None: it was not written."""
    written = record.get("written") or {}
    return {key: written[key] for key in ("hypernet", "method", "description") if written.get(key)} or None


def compare(first: Adapter, second: Adapter) -> dict[str, Any]:
    """Layer by layer: ranks, energies, and the cosine between the two updates, from thin products.

    Raises:
        UsageError: one adds to the weights and the other multiplies them.
    """
    if first.multiplies != second.multiplies:
        raise UsageError(
            f"{first.folder} is a {first.kind} and {second.folder} a {second.kind}: one adds to the weights, the other "
            "multiplies them",
            "inspect them one by one",
        )
    names = sorted(first.layers.keys() | second.layers.keys(), key=natural_order)
    dots, squares = 0.0, [0.0, 0.0]
    layers = {}
    for name in names:
        one, two = first.layers.get(name), second.layers.get(name)
        energies = [0.0 if factors is None else factors.energy() for factors in (one, two)]
        dot = _dot(one, two) if one and two and one.cost == two.cost else 0.0
        dots += dot
        squares = [square + energy**2 for square, energy in zip(squares, energies, strict=True)]
        product = energies[0] * energies[1]
        layers[name] = {
            "ranks": [0 if factors is None else factors.rank for factors in (one, two)],
            "energies": energies,
            "cosine": dot / product if product else None,
        }
    product = (squares[0] * squares[1]) ** 0.5
    return {"cosine": dots / product if product else None, "layers": layers}


def _dot(one: Factors, two: Factors) -> float:
    """<ΔW₁, ΔW₂> = tr((B₁ᵀ B₂)(A₂ A₁ᵀ))."""
    b = one.b_OC.double().T @ two.b_OC.double()
    a = two.a_CI.double() @ one.a_CI.double().T
    return float((b * a.T).sum())
