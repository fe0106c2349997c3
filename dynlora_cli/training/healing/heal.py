"""A few training steps for an adapter that was cut, by the recipe it was trained by, another, or rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.adapters.attach import attached, detached
from dynlora_cli.adapters.base import label_names
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Dataset, TrainSource
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.evaluation.references import state_for
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.execution.mode import plan, without_long_runs
from dynlora_cli.models.load import precision_of
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.tasks import task as tasks
from dynlora_cli.tasks.distillation import Taught
from dynlora_cli.text import counted
from dynlora_cli.training.batches import make_batches, training_batches
from dynlora_cli.training.healing.teacher import NOT_BY_TOKEN, Teacher, ask, learns_tokens
from dynlora_cli.training.loop import fit
from dynlora_cli.training.setup import make_accelerator, make_run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.sections import Model
    from dynlora_cli.data.batches import Batch, Batches
    from dynlora_cli.models.load import Base

# Where nobody says the learning rate. An adapter that was trained at 5e-4 was healed about as well at 2e-4 as at 5e-4,
# and forgot less (scripts/bench/NOTES.md).
RATE, OF_RUN = 2e-4, 0.4  # for adapters of others; of the rate that the run itself found
STOPPED = "interrupted while healing; nothing was written"
HELD_OUT = 0.2  # of a file's rows, to choose components and measure by; the others are trained on


def recipe_of(model: Model, file: Path, *, out: Path) -> Recipe:
    """What to heal by where there are only rows: one part of them to train on, another to measure on.

    Args:
        model: the base.
        file: rows.
        out: where the adapter will be.
    """
    dataset = Dataset(train=[TrainSource(path=str(file))], val_size=HELD_OUT)
    return Recipe(model=model, dataset=dataset, output_dir=str(out))


def _rate(adapter: Adapter, recipe: Recipe, emit: Emit) -> float:
    """The recipe's learning rate; for `auto` a part of that of the adapter's run, as a race would cost more."""
    if recipe.train.learning_rate != "auto":
        return recipe.train.learning_rate
    trained = (adapter.record.get("trained") or adapter.record.get("summary") or {}).get("learning_rate")
    rate = OF_RUN * trained if isinstance(trained, float) else RATE
    emit(note(f"heals at the learning rate {rate:.2g}; a recipe's train.learning_rate says another"))
    return rate


def heal(
    adapter: Adapter,
    base: Base,
    recipe: Recipe,
    steps: int,
    folder: Path,
    emit: Emit,
    teacher: Teacher | None = None,
) -> Adapter:
    """Train the components that are left; their number stays. Heads and magnitudes stay as they are.

    Args:
        adapter: that was cut.
        base: its base in memory.
        recipe: data, batches and learning rate; its schedule is run through in `steps`.
        steps: optimizer steps.
        folder: where trackers may write.
        emit: takes the events of the loop.
        teacher: what it was before; None: the rows alone teach.

    Raises:
        Interrupted: Ctrl-C; nothing is saved.
        UsageError: there is a teacher, and the rows are not learned token by token.
    """
    recipe = _for_healing(recipe, steps, _rate(adapter, recipe, emit))
    _tell_differences(adapter, recipe, emit)
    task = tasks.of(recipe.model.model_copy(update={"task": adapter.task}), recipe.train)
    data = load_data(
        recipe.dataset,
        base.tokenizer,
        task=task,
        seed=recipe.seed,
        max_length=base.files.context_length,
        num_labels=recipe.model.num_labels,
        labels=label_names(adapter),  # never found in these rows, which may lack a class
        writing=Writing.of(adapter.record),
    )
    _first_rows_alone(data, emit)
    reference = state_for(adapter, recipe, base, [*data.train, *data.val])
    if teacher and not learns_tokens(task.name, task.objective):
        raise UsageError(NOT_BY_TOKEN, "leave it out")
    with plan(recipe.train) as modes:
        accelerator = make_accelerator(recipe, folder, modes)
        modes.prepare(base.model)
        taught = _taught(teacher, base, recipe, data, accelerator, emit) if teacher else None
        with attached(base.model, adapter) as pool, torch.enable_grad():
            modes.apply(base.model, pool)
            if recipe.adapter.freeze_a:
                pool.freeze_a()
            run = make_run(recipe, accelerator, base, data, pool, None, modes, save=lambda _: None)
            run.emit = emit
            run.objective.load_state_dict(reference)
            run.objective = taught or run.objective
            try:
                fit(run)
            except Interrupted:
                raise Interrupted(STOPPED, "run the same command again") from None
            base.model.eval()
            return detached(adapter, pool)


def _tell_differences(adapter: Adapter, recipe: Recipe, emit: Emit) -> None:
    """Say what healing does otherwise than the recipe's run."""
    variant, rate = recipe.adapter.variant, recipe.train.learning_rate
    if variant not in (adapter.form, PLAIN):
        text = f"{variant} heals as the {adapter.kind} that it equals, at the learning rate of {variant}, {rate:g}"
        emit(note(text))
    if recipe.dataset.replay:
        emit(note("healing trains on the recipe's own rows alone; those of earlier runs are not replayed"))
    if getattr(recipe.model, "prior_caption", None):
        emit(note("healing trains on the recipe's own rows alone; no prior is learned beside them"))


def _first_rows_alone(data: Data, emit: Emit) -> None:
    """Of rows that a run read while it trained, heal on those of the first block."""
    if data.stream:
        emit(note(f"heals on the first {counted(len(data.train), 'row')} of those that the run read while it trained"))
        data.stream = None


def _for_healing(recipe: Recipe, steps: int, rate: float) -> Recipe:
    """The recipe for so many steps."""
    usual: dict[str, Any] = {"save_steps": None, "report_to": [], **without_long_runs(recipe.train)}
    train = recipe.train.model_copy(update={"max_steps": steps, "learning_rate": rate, **usual})
    evaluation = recipe.eval.model_copy(update={"steps": steps, "samples": 0, "early_stopping_patience": None})
    return recipe.model_copy(update={"train": train, "eval": evaluation})


def _taught(teacher: Teacher, base: Base, recipe: Recipe, data: Data, accelerator: Accelerator, emit: Emit) -> Taught:
    """The loss with what the adapter before the cut says of the rows that will be healed on; it looks at them now.

    Raises:
        Interrupted: Ctrl-C.
    """
    shown = training_batches(recipe, data, base, accelerator).shown(cast("int", recipe.train.max_steps))
    text = f"heals under the adapter before the cut, {teacher.share:.0%} of the loss, which looks at"
    emit(note(f"{text} {counted(len(shown), 'row')} first"))
    alone = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"packing": False})})
    rows = make_batches(alone, shown, base, shuffle=False, accelerator=accelerator)
    with attached(base.model, teacher.adapter), interruptible() as interrupted:
        told = ask(base.model, _until(rows, accelerator.device, interrupted), precision_of(base))
    return Taught(recipe.train, told, teacher.share)


def _until(rows: Batches, device: torch.device, interrupted: Callable[[], bool]) -> Iterator[Batch]:
    """All batches, on the device, unless somebody asks for a stop."""
    for number in range(rows.steps_per_epoch):
        for batch in rows.step(0, number):
            if interrupted():
                raise Interrupted(STOPPED, "run the same command again")
            yield batch.to(device)
