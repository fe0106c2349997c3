"""A budget in bytes of the file as a number of parameters: what names, heads and magnitudes leave of it.

The file is adapter_model.safetensors as `ls -l` shows it. Its header has two entries for each layer; the layers that
pruning leaves empty have none, so the file may come out a little smaller than the budget, and never larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dynlora_cli.adapters.adapter import Adapter, Factors, TokenRows
from dynlora_cli.adapters.write import bytes_of
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.dtypes import BYTES
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.start import Start
from dynlora_cli.models.load import Base
from dynlora_cli.text import count

Plan = Callable[[Budget], Start]


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
    width, limit = BYTES[dtype], int(budget.value)
    # As many components as could be there: numbers in the header are as long as they get.
    aside = beside(
        plan(Budget("parameters", max(sum(map(sum, shapes.values())), limit // width))), base, shapes, kind, dtype
    )
    largest = max(map(sum, shapes.values()))
    if (limit - aside) // width < largest:
        raise UsageError(
            f"rank.budget: {count(limit)} bytes are too few: names and shapes of {len(shapes)} layers, and what is no "
            f"factor, take {count(aside)} bytes of the file, and one component up to {count(largest * width)}",
            f"allow more, at least {count(aside + largest * width)}B, write `adapter.save_dtype: fp8`, "
            "or choose fewer layers in adapter.target_modules",
        )
    return Budget("parameters", (limit - aside) // width)


def beside(start: Start, base: Base, shapes: Mapping[str, tuple[int, int]], kind: str, dtype: str) -> int:
    """Bytes of the file beside the factors, where every layer has the components that it starts with."""
    layers = {name: _empty(kind, start.counts[name], *shape) for name, shape in shapes.items()}
    layers = {name: factors for name, factors in layers.items() if factors.rank}
    whole = {
        f"{name}.{key}": tensor
        for name in base.whole
        for key, tensor in base.model.get_submodule(name).state_dict().items()
    }
    rows = {table: TokenRows(own.tokens, own.own_TI) for table, own in base.rows.items()}
    adapter = Adapter(Path(), layers, {}, whole=whole, token_rows=rows, model_type=base.model.config.model_type)
    return bytes_of(adapter, dtype) - BYTES[dtype] * adapter.parameters


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
