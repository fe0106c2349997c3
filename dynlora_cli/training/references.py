"""The reference of a run whose objective has one (tasks/preference.py): the model before the first step.

Without `adapter.from` that is the base, with the components off: what they start with, such as PiSSA's directions,
plays no part. With it, it is the adapter that the run goes on from, and new components do nothing yet. It says what it
thinks of every row that the run will look at, once. After that it is not needed again, so it may be trained, pruned
and turned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dynlora_cli.errors import Interrupted
from dynlora_cli.lora.layer import switched_off
from dynlora_cli.tasks.preference import PreferenceObjective
from dynlora_cli.text import counted
from dynlora_cli.training.batches import make_batches

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch, Batches
    from dynlora_cli.training.run import Run


def remember_references(run: Run, interrupted: Callable[[], bool] = lambda: False) -> None:
    """Have the model, as it stands before the first step, look at all rows of the run; nothing where it has already.

    Raises:
        Interrupted: Ctrl-C; there is nothing to save yet.
    """
    objective = run.objective
    if not isinstance(objective, PreferenceObjective) or not objective.needs_reference or objective.references:
        return
    started = time.perf_counter()
    with _reference(run):
        for batches in _rows(run, objective):
            objective.remember(run.model, _on_device(run, batches, interrupted), run.accelerator.autocast)
    lines, seconds = len(objective.references), time.perf_counter() - started
    run.note(f"the reference has looked at {counted(lines, 'line')} in {seconds:.0f} s; it is not asked again")


def _reference(run: Run) -> AbstractContextManager[None]:
    return nullcontext() if run.recipe.adapter.origin else switched_off(run.trained.layers.values())


def _rows(run: Run, objective: PreferenceObjective) -> Iterator[Iterator[Batch]]:
    """What to look at: the steps of the first epoch, as they will come; then what has not been in them."""
    first = range(min(run.total_steps, run.batches.steps_per_epoch))
    yield (batch for number in first for batch in run.batches.step(0, number))
    data, more = run.data, [*run.data.val, *run.data.sizing]
    if run.total_steps > run.batches.steps_per_epoch:  # rows of sources that an epoch takes a part of
        more += [*data.train, *data.replayed]
    elif not data.val:
        more += data.train[: run.recipe.train.micro_batch_size * run.recipe.train.gradient_accumulation_steps]
    unseen = [example for example in more if not objective.references.has(example.line_keys())]
    if unseen:
        yield _in_order(make_batches(run.recipe, unseen, run.base, shuffle=False, accelerator=run.accelerator))


def _in_order(batches: Batches) -> Iterator[Batch]:
    return (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))


def _on_device(run: Run, batches: Iterator[Batch], interrupted: Callable[[], bool]) -> Iterator[Batch]:
    for batch in batches:
        (votes,) = run.total(interrupted())
        if votes:
            raise Interrupted(
                "interrupted while the reference looked at the rows; no step of the run was done",
                "start again with --overwrite",
            )
        yield batch.to(run.accelerator.device)
