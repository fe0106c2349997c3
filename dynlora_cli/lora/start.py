"""How many components each layer starts with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear

if TYPE_CHECKING:
    from dynlora_cli.config.budget import Budget
    from dynlora_cli.runs.record import Birth


@dataclass(frozen=True)
class Start:
    """Where a run begins and where it has to end.

    Attributes:
        counts: components of each layer at the start.
        parameters: numbers they hold.
        budget: numbers that may be alive at the end.
        average_rank: the budget, or where it is open the start, as an average rank: numbers / Σ(d_in + d_out).
        costs: numbers that one component of each layer holds.
        open: the budget is only a floor, and the run decides where to stop (`rank.budget: auto`).
        born: `counts` by birth: so many from each run of `births`, then the run's own; empty where all are its own.
        elastic: any first part of the components is to be an adapter of its own, see lora/nested.py.
        births: the runs that an adapter which the run goes on from came from, oldest first.
        altered_births: of these, the first so many were altered after their runs, as `Record.altered_births`.
    """

    counts: dict[str, int]
    parameters: int
    budget: int
    average_rank: float
    open: bool = False
    costs: dict[str, int] = field(default_factory=dict)
    born: dict[str, tuple[int, ...]] = field(default_factory=dict)
    births: tuple[Birth, ...] = ()
    altered_births: int = 0
    elastic: bool = False

    @property
    def limit(self) -> int | None:
        """The budget that the run was given; None where it finds its own."""
        return None if self.open else self.budget

    def rank_of(self, parameters: int) -> float:
        """A number of parameters as an average rank."""
        return self.average_rank * parameters / (self.parameters if self.open else self.budget)


def plan_start(
    shapes: Mapping[str, tuple[int, int]],
    budget: Budget,
    init: int | str,
    kind: type[ComponentLinear] = ComponentLinear,
    old: Mapping[str, int] | None = None,
    grows: Collection[str] | None = None,
) -> Start:
    """Resolve `rank.budget` and `rank.init` for the layers at hand.

    Args:
        shapes: (d_in, d_out) of every layer.
        kind: of the layers, which says how many numbers a component has.
        budget: kind "rank" (an average), "share" (of the start), "parameters" or "auto" (down to a quarter of a rank).
        init: components per layer at the start, or "auto": 2x the budget's average rank, 32 where that is a share or
            auto.
            Never above half of min(d_in, d_out), where the kind has no other limit.
        old: components that layers have already, of which none is left out.
        grows: the layers that get new ones, as many as there are to `init`; None: all.

    Raises:
        UsageError: the budget is smaller than one component.
    """
    assert budget.kind != "bytes", "see pruning/bytes_budget.py"
    costs = {name: sum(kind.widths(*shape)) for name, shape in shapes.items()}
    per_rank = sum(costs.values()) // kind.terms
    asked = {"rank": budget.value * per_rank, "parameters": budget.value}.get(budget.kind)
    if init == "auto":
        init = 32 // kind.terms if asked is None else max(1, math.ceil(2 * asked / sum(costs.values())))
    counts = {
        name: max((old or {}).get(name, 0), min(int(init), kind.most(*shape)) if grows is None or name in grows else 0)
        for name, shape in shapes.items()
    }
    parameters = sum(counts[name] * cost for name, cost in costs.items())
    largest = max(costs.values())
    if budget.kind == "auto":
        floor = max(largest, math.floor(budget.value * per_rank))
        return Start(counts, parameters, floor, parameters / per_rank, open=True, costs=costs)
    limit = math.floor(budget.value * parameters if asked is None else asked)
    if limit < largest:
        raise UsageError(
            f"rank.budget allows {limit:,} parameters, but one component of the target layers has up to {largest:,}",
            "raise rank.budget, or choose smaller layers in adapter.target_modules",
        )
    return Start(counts, parameters, limit, limit / per_rank, costs=costs)


def with_counts(start: Start, counts: Mapping[str, int]) -> Start:
    """The same start with other components; its budget stays."""
    parameters = sum(counts[name] * cost for name, cost in start.costs.items())
    average = start.average_rank * parameters / start.parameters if start.open else start.average_rank
    return replace(start, counts=dict(counts), parameters=parameters, average_rank=average)
