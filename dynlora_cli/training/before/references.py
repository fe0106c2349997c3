"""What the model, as it stands before the first step, says of the rows of a run whose objective asks for it.

    reference  what it makes of the very rows, for objectives that compare with it (tasks/preference.py)
    teacher    what it says of the answers while it reads more than is trained to be read (tasks/distillation.py)

Without `adapter.from` that is the base, with the components off: what they start with, such as PiSSA's directions,
plays no part. With it, it is the adapter that the run goes on from, and new components do nothing yet. It looks at
every row that comes up, once. After that it is not needed again, so it may be trained, pruned and turned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dynlora_cli.errors import Interrupted
from dynlora_cli.tasks.distillation import Distilled
from dynlora_cli.tasks.preference import PreferenceObjective
from dynlora_cli.text import counted
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.before.lessons import own_lessons

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch, Batches
    from dynlora_cli.training.run import Run


def remember_references(run: Run, interrupted: Callable[[], bool] = lambda: False) -> None:
    """Have the model, as it stands before the first step, look at all rows of the run; nothing where it has already.

    Raises:
        Interrupted: Ctrl-C; there is nothing to save yet.
    """
    if isinstance(run.objective, PreferenceObjective):
        _refer(run, run.objective, interrupted)
    elif isinstance(run.objective, Distilled):
        _teach(run, run.objective, interrupted)


def _refer(run: Run, objective: PreferenceObjective, interrupted: Callable[[], bool]) -> None:
    if not objective.needs_reference or objective.references:
        return
    started = time.perf_counter()
    with _before(run):
        for batches in _rows(run, objective):
            shown = (batch.to(run.accelerator.device) for batch in _unless_stopped(run, batches, interrupted))
            objective.remember(run.model, shown, run.accelerator.autocast)
    lines, seconds = len(objective.references), time.perf_counter() - started
    run.note(f"the reference has looked at {counted(lines, 'line')} in {seconds:.0f} s; it is not asked again")


def _teach(run: Run, objective: Distilled, interrupted: Callable[[], bool]) -> None:
    if not objective.share:
        return
    told = objective.told
    unknown = [example for example in run.batches.shown(run.total_steps) if example.row not in told]
    if not unknown:
        return
    started, lessons = time.perf_counter(), objective.lessons(unknown)
    with _before(run):
        for batch in _unless_stopped(run, own_lessons(run, lessons), interrupted):
            with run.accelerator.autocast():
                told.learn(run.model, batch)
    told.shared()
    tokens, seconds = sum(len(lesson.input_ids) for lesson in lessons), time.perf_counter() - started
    read = f"{counted(len(lessons), 'row')} with their contexts, {counted(tokens, 'token')}"
    run.note(f"the teacher has read {read}, in {seconds:.0f} s; it is not asked again")


def _before(run: Run) -> AbstractContextManager[None]:
    """The model as it stands before the first step."""
    return nullcontext() if run.recipe.adapter.origin else run.trained.switched_off()


def _rows(run: Run, objective: PreferenceObjective) -> Iterator[Iterator[Batch]]:
    """What to refer to: the steps of the first epoch, as they will come; then what has not been in them."""
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


def _unless_stopped(run: Run, batches: Iterator[Batch], interrupted: Callable[[], bool]) -> Iterator[Batch]:
    for batch in batches:
        (votes,) = run.total(interrupted())
        if votes:
            raise Interrupted(
                "interrupted while the model looked at the rows before the first step; no step of the run was done",
                "start again with --overwrite",
            )
        yield batch
