"""`train.learning_rate: auto`: a learning-rate range test before the run.

It is a race of short trials. Each begins where the run begins, sees the run's own first batches, and is judged
by its mean training loss over the last of them; since all see the same rows in the same order, a few steps tell two
rates apart. Rates lie a factor of 2 apart, and the search goes on until the best has a worse neighbour on both sides.
A rate that leaves the loss no lower than it was before the trial is no candidate: of broken models one may well look
better than the next. Where no rate is one, for the model learns nothing in so few steps, the highest that does no harm
is taken.
Factors of 2 are coarse, so the rate taken is the lowest point of the parabola through the best and its two neighbours,
over the logarithm of the rate. Losses rise more steeply on the high side, so it leans to the low one.
Nothing of a trial stays: values, moments and random state are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dynlora_cli.errors import Interrupted, MeasureError
from dynlora_cli.lora.moments import forget_steps
from dynlora_cli.training.run import Run
from dynlora_cli.training.step import backward, clip, finish_gradient, update

FIRST, LOWEST, HIGHEST = 2e-3, 1e-6, 0.5
STEPS, WARMUP, JUDGED = 24, 6, 8
HARMLESS = 0.01  # a trial does no harm if it ends at most this share above the untrained model's loss


def search(run: Run, interrupted: Callable[[], bool] = lambda: False) -> tuple[dict[float, float], float]:
    """Try rates until the best has a worse neighbour on both sides.

    Returns:
        The rates that were tried, each with its loss in nats per target; and the loss of the model as it is.

    Raises:
        MeasureError: every rate down to the lowest one diverges.
        Interrupted: Ctrl-C; there is nothing to save yet.
    """
    start = [parameter.detach().clone() for parameter in run.parameters]
    scaler = run.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    losses: dict[float, float] = {}
    with torch.random.fork_rng(devices):  # for dropout
        untrained = _untrained(run)

    def tried(rate: float) -> float:
        if rate not in losses:
            with torch.random.fork_rng(devices):
                losses[rate] = _trial(run, rate, interrupted)
            _restore(run, start)
            if scaler is not None:  # a trial that overflowed has lowered it
                scaler.load_state_dict(scale)
        return losses[rate] if losses[rate] < untrained else math.inf

    best = FIRST
    while LOWEST <= best <= HIGHEST:
        lower, here, higher = tried(best / 2), tried(best), tried(2 * best)
        if math.inf > here <= min(lower, higher):
            break
        if min(lower, here, higher) == math.inf and losses[best] <= (1 + HARMLESS) * untrained:
            break  # lower rates would do even less
        best = best / 2 if lower <= higher else 2 * best
    if not any(map(math.isfinite, losses.values())):
        raise MeasureError(
            f"the loss is not finite at any learning rate down to {min(losses):.0e}", "look at the rows and the model"
        )
    return losses, untrained


def choose(losses: dict[float, float], untrained: float) -> float:
    """Where the parabola through the best and its two neighbours is lowest; the best itself where one is missing."""
    best = min(losses, key=lambda rate: (losses[rate], rate))
    if losses[best] >= untrained:
        return max((rate for rate, loss in losses.items() if loss <= (1 + HARMLESS) * untrained), default=min(losses))
    lower, here, higher = (losses.get(rate, math.inf) for rate in (best / 2, best, 2 * best))
    bend = lower - 2 * here + higher
    return best * 2 ** ((lower - higher) / (2 * bend)) if 0 < bend < math.inf else best


@torch.no_grad()
def _untrained(run: Run) -> float:
    """The mean loss of the model as it is, on the steps that trials are judged by."""
    losses, steps = [], min(STEPS, run.total_steps)
    for number in range(max(0, steps - JUDGED), steps):
        micro_batches = run.batches.step(*divmod(number, run.batches.steps_per_epoch))
        sums = []
        for batch in micro_batches:
            batch = batch.to(run.accelerator.device)
            run.trained.see(batch)
            with run.accelerator.autocast():
                sums.append(run.objective.loss(run.model, batch).item())
        loss, supervised = run.total(sum(sums), sum(batch.supervised for batch in micro_batches))
        losses.append(loss / supervised)
    return sum(losses) / len(losses)


def _trial(run: Run, rate: float, interrupted: Callable[[], bool]) -> float:
    """Mean loss over the last steps of a short run; infinite where it diverges."""
    losses = []
    for number in range(min(STEPS, run.total_steps)):
        micro_batches = run.batches.step(*divmod(number, run.batches.steps_per_epoch))
        run.trained.begin_step(number + 1, run.total_steps)
        (supervised,) = run.total(sum(batch.supervised for batch in micro_batches))
        loss, stop_votes = run.total(sum(backward(run, batch, supervised) for batch in micro_batches), interrupted())
        if stop_votes:
            raise Interrupted(
                "interrupted while looking for a learning rate; no step of the run was done",
                "start again with --overwrite; a number in train.learning_rate skips the search",
            )
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
        update(run, skipped=norm is None)
    return sum(losses[-JUDGED:]) / len(losses[-JUDGED:])


def _restore(run: Run, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(run.parameters, start, strict=True):
            parameter.copy_(value)
    forget_steps(run.optimizer)
    run.trained.zero_grad(run.optimizer)
