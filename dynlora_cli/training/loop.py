"""The training loop: `fit` walks over optimizer steps, `step` is one of them.

fit ── step ── backward         the gradient of the token-normalised loss
  │      ├──── control.observe  scores, from the gradient as it stands
  │      └──── control.apply    components go; module, group and moments together
  ├── evaluate, checkpoint      on their own schedules
  └── Ctrl-C                    finishes the step, saves, raises Interrupted
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dynlora_cli.errors import Interrupted, MachineError, UsageError
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.runs import events
from dynlora_cli.training import samples
from dynlora_cli.training.before.references import remember_references
from dynlora_cli.training.held_out import also_losses, answers_due, evaluation_due, few_evaluations, held_out_loss
from dynlora_cli.training.metrics import Window
from dynlora_cli.training.rate.race import settle_rate
from dynlora_cli.training.run import Run
from dynlora_cli.training.step import advance, hold_alike

AUTOSAVE_SECONDS = 600.0


def fit(run: Run) -> None:
    """Train from `run.progress.step` to the end, or until early stopping.

    Raises:
        Interrupted: Ctrl-C, after the step in hand was finished and saved.
        MeasureError: the loss or the gradient is not finite.
    """
    window, saved_at, saved_step = Window(), time.monotonic(), run.progress.step
    with run.reading(), run.random, interruptible() as interrupted:
        remember_references(run, interrupted)
        if note := few_evaluations(run):
            run.note(note)
        _measure_before(run)
        run.model.train()
        if run.progress.learning_rate is None:
            window = settle_rate(run, interrupted)
        while not _finished(run):
            record = _advance(run, window, interrupted, saved_step)
            evaluated = evaluation_due(run)
            if evaluated:
                _evaluate_and_judge(run)
            elif samples.shows_alone(run):
                samples.show(run)
            leaving = _finished(run) or record["stop"]
            if leaving:
                hold_alike(run, f"after step {run.progress.step}")
            if leaving or _save_due(run, evaluated, time.monotonic() - saved_at):
                run.save(run)
                saved_at, saved_step = time.monotonic(), run.progress.step
            if leaving:
                # Processes that leave wait until the save is done. At other saves none waits: by their clocks,
                # processes may not even agree on when one is due.
                run.accelerator.wait_for_everyone()
            if record["stop"] and not _finished(run):
                raise Interrupted(
                    f"interrupted after step {run.progress.step} of {run.total_steps}; everything is saved",
                    "go on with --resume",
                )
    if _out_of_patience(run):
        run.note(f"no better for {run.progress.evaluations_since_best} evaluations: done")


def _advance(run: Run, window: Window, interrupted: Callable[[], bool], saved_step: int) -> dict[str, Any]:
    """The next step; what was trained is saved first, where its rows are read now and cannot be.

    Raises:
        DataError, UsageError, MachineError: they cannot.
    """
    try:
        record = advance(run, window, interrupted)
    except (UsageError, MachineError) as error:
        step = run.progress.step
        if run.stream is None or run.stream.fault is not error or not step:
            raise
        if step != saved_step:
            run.save(run)
            run.accelerator.wait_for_everyone()
        then = f"{error.hint}; then go on with --resume" if error.hint else "mend that, then go on with --resume"
        raise type(error)(f"{error.message} (after step {step} of {run.total_steps}, which is saved)", then) from error
    for text in run.stream.notes() if run.stream else ():
        run.note(text)
    return record


def _measure_before(run: Run) -> None:
    progress = run.progress
    if progress.first is None and run.val_batches:
        progress.first = progress.last = held_out_loss(run)
        _emit_evaluation(run, progress.first, best=False)
    elif progress.step == 0 and samples.shows_alone(run):
        samples.show(run)
    if progress.also is None and progress.step == 0 and run.also:
        progress.also = also_losses(run)


def _save_due(run: Run, evaluated: bool, seconds_since: float) -> bool:
    """Every `save_steps`, and whenever the best was found; by default every 10 minutes and at each evaluation."""
    every, best = run.recipe.train.save_steps, run.progress.best
    if every is None:
        return evaluated or seconds_since > AUTOSAVE_SECONDS
    return run.progress.step % every == 0 or (best is not None and best["step"] == run.progress.step)


def _finished(run: Run) -> bool:
    return run.progress.step >= run.total_steps or _out_of_patience(run)


def _out_of_patience(run: Run) -> bool:
    patience = run.recipe.eval.early_stopping_patience
    return patience is not None and run.progress.evaluations_since_best >= patience


def _evaluate_and_judge(run: Run) -> None:
    """Evaluate and remember the best."""
    progress = run.progress
    # The best only competes once the budget is met, or it would be a larger adapter than was asked for.
    competes = run.control.budget_met
    result = held_out_loss(run)
    best = competes and (progress.best is None or result["loss"] < progress.best["loss"])
    progress.last = result
    if best:
        progress.best = {"step": progress.step, **result}
        progress.evaluations_since_best = 0
    elif competes:
        progress.evaluations_since_best += 1
    _emit_evaluation(run, result, best=best)


def _emit_evaluation(run: Run, result: dict[str, float], *, best: bool) -> None:
    progress = run.progress
    run.emit(events.evaluation(progress.step, result, best=best, seconds=progress.seconds))
    run.accelerator.log({f"eval/{key}": value for key, value in result.items()}, step=progress.step)
    if answers_due(run):
        samples.show(run)
