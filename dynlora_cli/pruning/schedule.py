"""When the pruning events of a run are, and how many parameters may be alive after each; plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST = 3  # steps that a run must have to prune: in the first B is 0, and after the last event the rest must train


@dataclass(frozen=True)
class Schedule:
    """The events of a run: after optimizer step `steps[j]` at most `targets[j]` parameters are alive.

    Attributes:
        begin: the step after which scores are observed.
        steps: optimizer steps of the events, rising; empty where there is nothing to prune.
        targets: parameters allowed after each; the last is the budget.
    """

    begin: int
    steps: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def plan(
        cls, *, total_steps: int, start: float, end: float, events: int | str, parameters: int, budget: int
    ) -> Schedule:
        """Spread events evenly over [start, end] of the run, with a cubic descent to the budget.

        alive(t) = budget + (parameters - budget) · (1 - t)³, t from 0 to 1 (AdaLoRA, arXiv 2303.10512, equation 12).

        Args:
            total_steps: optimizer steps of the whole run.
            start, end: shares of `total_steps`.
            events: number of events, or "auto": one for each 10 steps, at most 20, at least 1.
            parameters: alive at the start.
            budget: alive at the end, at most.
        """
        if parameters <= budget or total_steps < SHORTEST:
            return cls(total_steps, (), ())
        begin = min(round(start * total_steps), total_steps - 1)
        length = max(1, round(end * total_steps) - begin)
        count = max(1, min(20, length // 10)) if events == "auto" else max(1, min(int(events), length))
        shares = [(j + 1) / count for j in range(count)]
        steps = tuple(begin + math.ceil(share * length) for share in shares)
        targets = tuple(budget + math.floor((parameters - budget) * (1 - share) ** 3) for share in shares)
        return cls(begin, steps, targets)

    @classmethod
    def descend(
        cls, *, total_steps: int, start: float, end: float, events: int | str, parameters: int, budget: int
    ) -> Schedule:
        """Spread events evenly over [start, end] of the run, each of which takes the same share of what is alive.

        The share is at most a half, so a run with few events may end above the floor.

        Args:
            events: number of events, or "auto": one for each 5 steps, at most 14, at least 1.
            budget: a floor for what is alive after the last one; the others as in `plan`.
        """
        if total_steps < SHORTEST:
            return cls(total_steps, (), ())
        begin = min(round(start * total_steps), total_steps - 1)
        length = max(1, round(end * total_steps) - begin)
        count = max(1, min(14, length // 5)) if events == "auto" else max(1, min(int(events), length))
        steps = tuple(begin + math.ceil((j + 1) / count * length) for j in range(count))
        kept = max(0.5, (budget / parameters) ** (1 / count))
        return cls(begin, steps, tuple(max(budget, math.floor(parameters * kept ** (j + 1))) for j in range(count)))

    @property
    def last(self) -> int:
        """The step after which the budget is met; 0 where it is from the start."""
        return self.steps[-1] if self.steps else 0
