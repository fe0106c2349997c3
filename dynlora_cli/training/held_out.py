"""What a run finds on rows that it does not train on, shared among its processes.

evaluation_due  when it looks
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
from dynlora_cli.text import counted
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.run import Run
from dynlora_cli.training.step import LOWER_RATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynlora_cli.data.batches import Batch, Batches

# Without `eval.steps`: so many looks at the held-out rows, evenly spread, unless they would take more than an eighth of
# the time of the steps. A row that is measured takes about half of one that is trained on: scripts/bench/NOTES.md.
EVALUATIONS, MOST_OF_THE_STEPS, OF_A_STEP = 8, 0.125, 0.5


def evaluation_due(run: Run) -> bool:
    """Whether the step just done is one of those after which the held-out loss is taken; the last always is."""
    step, every = run.progress.step, run.recipe.eval.steps
    if run.val_batches is None:
        return False
    if every and step != run.total_steps:
        return step % every == 0
    return _passes(step, evaluations(run), run.total_steps)


def evaluations(run: Run) -> int:
    """How often that is, where `eval.steps` does not say: evenly spread, and never less than once an epoch."""
    epochs = max(1, round(run.total_steps / run.batches.steps_per_epoch))
    return epochs * max(1, min(round(EVALUATIONS / epochs), int(_affordable(run) / epochs)))


def first_evaluation(run: Run) -> int:
    """The first step after which the held-out loss is taken; the last one at the latest."""
    if run.val_batches is None:
        return run.total_steps
    often = evaluations(run)
    return min(run.recipe.eval.steps or -(-run.total_steps // often), run.total_steps)


def few_evaluations(run: Run) -> str:
    """What to say where so many rows are held out that the run can look at them a few times only; else nothing."""
    if run.val_batches is None or run.recipe.eval.steps or (often := evaluations(run)) >= EVALUATIONS // 2:
        return ""
    held_out = len(run.val_batches.examples)
    rows = int(held_out * _affordable(run) / EVALUATIONS)
    if rows < 8:  # a run too short for a curve, whatever is held out
        return ""
    looks = f"the loss on {counted(held_out, 'held-out row')} is taken {counted(often, 'time')} while training"
    return f"{looks}; with eval.max_samples: {rows} that would be {EVALUATIONS} times at the same cost"


def answers_due(run: Run) -> bool:
    """Whether the evaluation just done shows answers (`eval.samples`) as well, which may take longer than the loss.

    At each evaluation that was asked for; else before the first step, after each epoch and at the end.
    """
    step = run.progress.step
    return bool(run.recipe.eval.steps) or step in (0, run.total_steps) or step % run.batches.steps_per_epoch == 0


def _affordable(run: Run) -> float:
    """Evaluations that take no more than a given share of the time of all steps."""
    assert run.val_batches is not None
    return MOST_OF_THE_STEPS * run.total_steps / (OF_A_STEP * run.val_batches.steps_per_epoch)


def _passes(step: int, parts: int, whole: int) -> bool:
    """Whether a step is the first at or behind the end of one of the equal parts of a whole."""
    return step * parts // whole > (step - 1) * parts // whole


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


def _seen(run: Run, batches: Batches) -> Iterator[Batch]:
    """The batches on the device, each shown to what trains right before the model is given it."""
    for index in range(batches.steps_per_epoch):
        for batch in batches.step(0, index):
            moved = batch.to(run.accelerator.device)
            run.trained.see(moved)
            yield moved


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
        _seen(run, batches),
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
