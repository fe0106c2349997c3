"""A few training steps for an adapter that was cut, by the recipe it was trained by, another, or rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli.adapters.attach import attached, detached
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Dataset, TrainSource
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import Interrupted
from dynlora_cli.evaluation.references import state_for
from dynlora_cli.execution.mode import plan, without_long_runs
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.tasks import task as tasks
from dynlora_cli.training.loop import fit
from dynlora_cli.training.setup import make_accelerator, make_run

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.sections import Model
    from dynlora_cli.models.load import Base

# Where nobody says the learning rate. An adapter that was trained at 5e-4 was healed about as well at 2e-4 as at 5e-4,
# and forgot less (scripts/bench/NOTES.md).
RATE, SHARE = 2e-4, 0.4  # for adapters of others; of the rate that the run itself found
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
    rate = SHARE * trained if isinstance(trained, float) else RATE
    emit(note(f"heals at the learning rate {rate:.2g}; a recipe's train.learning_rate says another"))
    return rate


def heal(adapter: Adapter, base: Base, recipe: Recipe, steps: int, folder: Path, emit: Emit) -> Adapter:
    """Train the components that are left; their number stays. Heads and magnitudes stay as they are.

    Args:
        adapter: that was cut.
        base: its base in memory.
        recipe: data, batches and learning rate; its schedule is run through in `steps`.
        steps: optimizer steps.
        folder: where trackers may write.
        emit: takes the events of the loop.

    Raises:
        Interrupted: Ctrl-C; nothing is saved.
    """
    usual: dict[str, Any] = {"save_steps": None, "report_to": [], **without_long_runs(recipe.train)}
    rate = _rate(adapter, recipe, emit)
    train = recipe.train.model_copy(update={"max_steps": steps, "learning_rate": rate, **usual})
    evaluation = recipe.eval.model_copy(update={"steps": steps, "samples": 0, "early_stopping_patience": None})
    recipe = recipe.model_copy(update={"train": train, "eval": evaluation})
    variant = recipe.adapter.variant
    if variant != adapter.form:
        text = f"{variant} heals as the {adapter.kind} that it equals, at the learning rate of {variant}, {rate:g}"
        emit(note(text))
    if recipe.dataset.replay:
        emit(note("healing trains on the recipe's own rows alone; those of earlier runs are not replayed"))
    data = load_data(
        recipe.dataset,
        base.tokenizer,
        task=tasks.of(recipe.model.model_copy(update={"task": adapter.task}), recipe.train),
        seed=recipe.seed,
        max_length=base.files.context_length,
        num_labels=recipe.model.num_labels,
        writing=Writing.of(adapter.record),
    )
    reference = state_for(adapter, recipe, base, [*data.train, *data.val])
    with plan(recipe.train) as modes:
        accelerator = make_accelerator(recipe, folder, modes)
        modes.prepare(base.model)
        with attached(base.model, adapter) as pool, torch.enable_grad():
            modes.apply(base.model, pool)
            if recipe.adapter.freeze_a:
                pool.freeze_a()
            run = make_run(recipe, accelerator, base, data, pool, None, modes, save=lambda _: None)
            run.emit = emit
            run.objective.load_state_dict(reference)
            try:
                fit(run)
            except Interrupted:
                text = "interrupted while healing; nothing was written"
                raise Interrupted(text, "run the same command again") from None
            base.model.eval()
            return detached(adapter, pool)
