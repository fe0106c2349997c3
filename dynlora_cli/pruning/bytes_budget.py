"""A budget in bytes of the file as a number of parameters: what names, heads and magnitudes leave of it.

The file is adapter_model.safetensors as `ls -l` shows it. Its header has two entries for each layer with components.
Which layers those will be is not known before the end, so the worst is assumed: that as many live as have room. The
file is never larger than the budget, and smaller where pruning leaves fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dynlora_cli.adapters.adapter import PREFIX, Adapter, Factors, TokenRows
from dynlora_cli.adapters.write import bytes_of, is_factor, shapes_of
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.dtypes import BYTES
from dynlora_cli.errors import UsageError
from dynlora_cli.files.tensor_file import EMPTY_HEADER, parts_of_file
from dynlora_cli.lora.start import Start
from dynlora_cli.models.load import Base
from dynlora_cli.text import count

Plan = Callable[[Budget], Start]


@dataclass(frozen=True)
class Room:
    """What a file needs, whatever lives at the end.

    Attributes:
        fixed: bytes that are there in any case.
        layers: bytes of a layer beside its factors, in the file as long as one of its components lives, and the
            numbers of one component; most bytes a number first.
        width: bytes of a number.
    """

    fixed: int
    layers: tuple[tuple[int, int], ...]
    width: int

    def at_most(self, parameters: int) -> int:
        """Bytes that no file with so many parameters exceeds: a layer is there only where one component fits."""
        total, left = float(self.fixed + self.width * parameters), parameters
        for size, cost in self.layers:
            total += size * min(1.0, left / cost)
            left -= min(left, cost)
        return math.ceil(total)


def in_parameters(
    budget: Budget, plan: Plan, base: Base, shapes: Mapping[str, tuple[int, int]], kind: str, dtype: str
) -> Budget:
    """The number of parameters that may live, so that the file of a run is within its budget.

    Args:
        budget: of kind "bytes"; any other comes back as it is.
        plan: of a start within a budget.
        base: whose heads and rows of tokens are in the file as well.
        shapes: (d_in, d_out) of every layer.
        kind: the file of adapters/kinds/ that the adapter is saved as.
        dtype: of its factors.

    Raises:
        UsageError: what is no factor fills the budget alone.
    """
    if budget.kind != "bytes":
        return budget
    limit = int(budget.value)
    # As many components as could be there: numbers in the header are as long as they get.
    start = plan(Budget("parameters", max(sum(map(sum, shapes.values())), limit // BYTES[dtype])))
    room = room_of(start, base, shapes, kind, dtype)
    least = max(start.costs.values())
    if room.at_most(least) > limit:
        other = "" if dtype == "fp8" else "write `adapter.save_dtype: fp8`, "
        raise UsageError(
            f"rank.budget: {count(limit)} bytes are too few: one component, the names and shapes of its layers, and "
            f"what is no factor, take up to {count(room.at_most(least))} bytes of the file",
            f"allow more, at least {in_kilobytes(room.at_most(least))}, {other}"
            "or choose smaller layers in adapter.target_modules",
        )
    fits, exceeds = least, limit // BYTES[dtype] + 1
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if room.at_most(middle) <= limit else (fits, middle)
    return Budget("parameters", fits)


def in_kilobytes(size: int) -> str:
    """A number of bytes as a budget that allows it: `3.7kB`."""
    return f"{math.ceil(size / 100) / 10:g}kB" if size < 10**6 else f"{math.ceil(size / 10**4) / 100:g}MB"


def room_of(start: Start, base: Base, shapes: Mapping[str, tuple[int, int]], kind: str, dtype: str) -> Room:
    """What the file needs beside the factors, where the layers have at most the components that they start with."""
    ranks = {name: start.counts[name] * start.costs[name] // sum(shape) for name, shape in shapes.items()}
    layers = {name: _empty(kind, ranks[name], *shape) for name, shape in shapes.items() if ranks[name]}
    whole = {
        f"{name}.{key}": tensor
        for name in base.whole
        for key, tensor in base.model.get_submodule(name).state_dict().items()
    }
    rows = {table: TokenRows(own.tokens, own.own_TI) for table, own in base.rows.items()}
    adapter = Adapter(Path(), layers, {}, whole=whole, token_rows=rows, model_type=base.model.config.model_type)
    fixed, of_layers = 8 + EMPTY_HEADER + 7, dict.fromkeys(layers, 0)  # filled up to eight bytes
    for name, (entry, numbers) in parts_of_file(shapes_of(adapter, dtype)).items():
        size = entry + (0 if is_factor(name) else numbers)
        if (layer := _layer_of(name.removeprefix(PREFIX), of_layers)) is None:
            fixed += size
        else:
            of_layers[layer] += size
    sizes = [(size, start.costs[name]) for name, size in of_layers.items()]
    return Room(fixed, tuple(sorted(sizes, key=lambda one: -one[0] / one[1])), BYTES[dtype])


def _layer_of(tensor: str, layers: Container[str]) -> str | None:
    """The layer that a tensor belongs to; None: to none."""
    while tensor:
        tensor = tensor.rpartition(".")[0]
        if tensor in layers:
            return tensor
    return None


def _empty(kind: str, rank: int, d_in: int, d_out: int) -> Factors:
    """Factors without numbers."""
    a_CI, b_OC = torch.empty(rank, d_in, device="meta"), torch.empty(d_out, rank, device="meta")
    own = {"magnitude_O": torch.empty(d_out, device="meta")} if kind == "dora" else {}
    return replace(Factors(a_CI, b_OC), kind=kind, own=own)


def most_within(limit: int, order: Any, dtype: str, least: int, most: int) -> int:
    """The parameters that may stay of a trained adapter, so that its file is within a limit; 0: none would.

    Args:
        limit: bytes.
        order: of pruning/posthoc.py.
        dtype: of the factors.
        least, most: between which to look.
    """

    def fits(parameters: int) -> bool:
        return bytes_of(order.cut(order.keep(parameters)[0]), dtype) <= limit

    if not fits(least):
        return 0
    if fits(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
