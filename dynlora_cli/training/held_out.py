"""What a run finds on rows that it does not train on, shared among its processes.

held_out_loss   on the rows that it holds out
also_losses     on rows of other kinds, before the first step and at the end
forgotten       what is between the two
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import MeasureError
from dynlora_cli.evaluation import also
from dynlora_cli.evaluation.also import Measured
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.runs import events
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.run import Run
from dynlora_cli.training.step import LOWER_RATE

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batches


def held_out_loss(run: Run) -> dict[str, float]:
    """Loss over the validation rows.

    Raises:
        MeasureError: it is not finite.
    """
    assert run.val_batches is not None
    return _loss_over(run, run.val_batches, "held-out loss", "held-out rows")


def also_losses(run: Run) -> dict[str, Measured]:
    """Loss over the rows of every set of `eval.also`, by its name.

    Raises:
        MeasureError: one is not finite.
    """
    found: dict[str, Measured] = {}
    for rows in run.also:
        batches = make_batches(run.recipe, rows.examples, run.base, shuffle=False, accelerator=run.accelerator)
        loss = _loss_over(run, batches, f"loss on {rows.name} (eval.also)", f"rows of {rows.name}")["loss"]
        found[rows.name] = rows.measured(loss)
    if found:
        step, losses = run.progress.step, {name: one["loss"] for name, one in found.items()}
        run.emit(events.also(step, losses))
        run.accelerator.log({f"also/{name}": loss for name, loss in losses.items()}, step=step)
    return found


def forgotten(run: Run) -> dict[str, Any]:
    """`also` and `forgetting` of a summary; measures the run as it is now.

    Raises:
        MeasureError: a loss is not finite.
    """
    before = run.progress.also or {}
    same = {(name, one["sha256"]) for name, one in before.items()}
    for rows in run.also:
        if (rows.name, rows.sha256) not in same:
            run.note(f"forgetting on {rows.name} is not measured: its rows are others than when the run began")
    run.also = [rows for rows in run.also if (rows.name, rows.sha256) in same]
    return also.forgotten(before, also_losses(run))


def _loss_over(run: Run, batches: Batches, what: str, rows: str) -> dict[str, float]:
    """Loss over the rows of some batches.

    Args:
        run: the run.
        batches: the share of this process.
        what: is measured, for a message.
        rows: that it is measured on, likewise.

    Raises:
        MeasureError: it is not finite.
    """
    device = run.accelerator.device
    result = held_out(
        run.model,
        (batch.to(device) for index in range(batches.steps_per_epoch) for batch in batches.step(0, index)),
        describe=run.task.held_out,
        autocast=run.accelerator.autocast,
        reduce=lambda sums: run.reduce(sums.to(device)).cpu(),
    )
    if not math.isfinite(result["loss"]):
        step = run.progress.step
        raise MeasureError(
            f"the {what} is {result['loss']} after step {step}",
            f"{LOWER_RATE}, or look at the {rows}" if step else "look at the model's weights and its dtype",
        )
    return result
