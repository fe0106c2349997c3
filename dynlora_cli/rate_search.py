"""The learning rate: its course over a run, and the search for its height where the recipe says `auto`.

The search is a race of short trials. Each begins where the run begins, sees the run's own first batches, and is judged
by its mean training loss over the last of them; since all see the same rows in the same order, a few steps tell two
rates apart. Rates lie a factor of 2 apart, and the search goes on until the best has a worse neighbour on both sides.
Nothing of a trial stays: values, moments and random state are put back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dynlora_cli.errors import MeasureError
from dynlora_cli.optimizer_step import backward, clip, finish_gradient, update
from dynlora_cli.state import Run

if TYPE_CHECKING:
    from dynlora_cli.recipe import Train

FIRST, LOWEST, HIGHEST = 2e-3, 1e-6, 0.5
STEPS, WARMUP, JUDGED = 20, 5, 8


def rate_share(step: int, total_steps: int, options: Train) -> float:
    """The scheduled rate of optimizer step `step` (from 1), as a share of the highest, before the coupling."""
    warmup = max(1, round(options.warmup_ratio * total_steps)) if options.warmup_ratio else 0
    if step <= warmup:
        return step / warmup
    left = 1 - (step - warmup - 1) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}
    return shape[options.lr_scheduler]


def search(run: Run) -> dict[float, float]:
    """The rates tried, each with its loss in nats per target.

    Raises:
        MeasureError: every rate down to the lowest one diverges.
    """
    start = [parameter.detach().clone() for parameter in run.parameters]
    random_state = torch.get_rng_state()
    losses: dict[float, float] = {}

    def tried(rate: float) -> float:
        if rate not in losses:
            torch.set_rng_state(random_state)
            losses[rate] = _trial(run, rate)
            _restore(run, start)
        return losses[rate]

    best = FIRST
    while LOWEST <= best <= HIGHEST:
        lower, higher = tried(best / 2), tried(2 * best)
        if tried(best) <= min(lower, higher) and math.isfinite(tried(best)):
            break
        best = best / 2 if lower <= higher else 2 * best
    torch.set_rng_state(random_state)
    if not any(map(math.isfinite, losses.values())):
        raise MeasureError(
            f"the loss is not finite at any learning rate down to {min(losses):.0e}", "look at the rows and the model"
        )
    return losses


def _trial(run: Run, rate: float) -> float:
    """Mean loss over the last steps of a short run; infinite where it diverges."""
    losses = []
    for number in range(min(STEPS, run.total_steps)):
        micro_batches = run.batches.step(*divmod(number, run.batches.steps_per_epoch))
        (supervised,) = run.total(sum(batch.supervised for batch in micro_batches))
        (loss,) = run.total(sum(backward(run, batch, supervised) for batch in micro_batches))
        if not math.isfinite(loss):
            return math.inf
        losses.append(loss)
        try:
            norm = finish_gradient(run, number + 1, micro_batches)
        except MeasureError:
            return math.inf
        if norm is not None:
            clip(run, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (number + 1) / WARMUP)
        update(run)
    return sum(losses[-JUDGED:]) / len(losses[-JUDGED:])


def _restore(run: Run, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(run.parameters, start, strict=True):
            parameter.copy_(value)
    run.optimizer.state.clear()
    run.optimizer.zero_grad(set_to_none=run.pool is None)
