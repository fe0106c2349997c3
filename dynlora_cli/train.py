"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents, `plan` the same without training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli import drawers, outputs, run_folder
from dynlora_cli.assemble import (
    Emit,
    attach,
    keep_libraries_quiet,
    make_accelerator,
    make_batches,
    make_run,
    make_schedule,
    plan_ranks,
    read_base,
    read_data,
    total_steps,
)
from dynlora_cli.checkpoint import read_state, restore
from dynlora_cli.components import linear_shape
from dynlora_cli.data import show_example
from dynlora_cli.errors import UsageError
from dynlora_cli.loop import Progress, fit, learning_rate
from dynlora_cli.recipe import to_yaml
from dynlora_cli.report_log import RunLog

if TYPE_CHECKING:
    from dynlora_cli.recipe import Recipe

# What may differ when a run is resumed: it changes what is shown and kept, not what is learned.
FREE_ON_RESUME = ("output_dir", "train.log_steps", "train.save_steps", "train.report_to")


def run(
    recipe: Recipe,
    *,
    listener: Emit = lambda event: None,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: Path | None = None,
) -> dict[str, Any]:
    """Train as the recipe says and leave a complete run folder.

    Args:
        recipe: checked already.
        listener: takes every event of the run, see report_log.py.
        overwrite: replace an earlier run in the output folder.
        resume: go on with the newest valid checkpoint of the output folder.
        resume_from: go on with this checkpoint folder.

    Returns:
        The summary, as data.

    Raises:
        DynloraError: with the exit code that fits.
    """
    folder = Path(recipe.output_dir)
    checkpoint = _find_checkpoint(folder, recipe, resume, resume_from)
    if checkpoint is None and resume and (finished := _finished(folder)):
        listener({"event": "note", "text": f"{folder} is finished already; nothing to do"})
        return finished
    if checkpoint is None:
        run_folder.refuse_occupied(folder, overwrite=overwrite)
    accelerator = _accelerator(recipe, folder)
    variant = drawers.load("variants", recipe.adapter.variant)
    tokenizer, data = _data(recipe)
    base = _load(recipe, tokenizer, accelerator.device, data.labels)
    pool, start = _attach(variant, base, recipe)
    if checkpoint is None and accelerator.is_main_process:
        run_folder.claim(folder, overwrite=overwrite)
    accelerator.wait_for_everyone()
    position, tensors = read_state(checkpoint) if checkpoint else (None, {})
    if pool and position:
        pool.adopt(torch.zeros(position["parameters"], device=accelerator.device), position["counts"])
    record = _record(recipe, base, data, accelerator, start)
    keep_until = position["progress"]["step"] if position else None
    with RunLog(folder, keep_until) if accelerator.is_main_process else _Silent() as log:

        def emit(event: dict[str, Any]) -> None:
            if accelerator.is_main_process:
                log(event)
                listener(event)

        training = _assemble(recipe, accelerator, base, data, pool, start, emit)
        training.save = partial(_checkpoint, folder=folder, base=base)
        if position:
            averages = restore(tensors, training.parameters, training.optimizer)
            training.progress = Progress(**position["progress"])
            if training.control:
                training.control.load_state_dict(averages)
            emit({"event": "note", "text": f"resuming from {checkpoint}"})
        if accelerator.is_main_process:
            run_folder.write_json(folder / run_folder.RECORD, record)
        emit(_start_event(recipe, training, base, data, start))
        _seed_dropout(recipe, accelerator, fresh=position is None)
        fit(training)
        adapter = _final_files(folder, training, base, tokenizer)
        summary = _summary(recipe, training, start, folder, adapter)
        _finish(folder, record, training, base, summary)
        emit({"event": "end", "summary": summary})
    accelerator.end_training()
    return summary


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do, found without loading weights and without writing anything.

    Returns:
        recipe_yaml, example, modules, parameters, schedule, steps, notes; see Console.show_plan.
    """
    variant = drawers.load("variants", recipe.adapter.variant)
    run_folder.refuse_occupied(Path(recipe.output_dir), overwrite=True)
    tokenizer, data = _data(recipe)
    base = _load(recipe, tokenizer, torch.device("meta"), data.labels)
    batches = _batches(recipe, data.train, tokenizer, shuffle=True)
    steps = _total_steps(recipe, batches)
    found: dict[str, Any] = {
        "recipe_yaml": to_yaml(recipe),
        "example": show_example(data.train[0], tokenizer),
        "parameters": {"base": sum(p.numel() for p in base.model.parameters())},
        "modules": [],
        "schedule": [],
        "steps": steps,
        "data": {"counts": data.counts, "sha256": data.sha256},
        "notes": data.notes,
    }
    if not variant.has_components:
        return found
    targets = find_targets(base.model, recipe.adapter.target_modules, head=base.head)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    start = plan_start(shapes, recipe.rank.parsed_budget(), recipe.rank.init)
    schedule = _schedule(recipe, steps, start)
    found["modules"] = [
        {"name": name, "d_in": shape[0], "d_out": shape[1], "components": start.counts[name]}
        for name, shape in shapes.items()
    ]
    found["parameters"].update(start=start.parameters, budget=start.budget)
    alive = [(0, start.parameters), *zip(schedule.steps, schedule.targets, strict=True)]
    found["schedule"] = [
        {
            "step": step,
            "parameters": parameters,
            "learning_rate": learning_rate(max(1, step), steps, recipe.train)
            * (start.parameters / parameters) ** recipe.pruning.lr_coupling,
        }
        for step, parameters in alive
    ]
    return found


def _find_checkpoint(folder: Path, recipe: Recipe, resume: bool, resume_from: Path | None) -> Path | None:
    """The checkpoint to go on with, or None for a new run (or one that is finished).

    Raises:
        UsageError: nothing to resume, or the recipe is another one.
    """
    if resume_from is not None:
        if not run_folder.is_whole(resume_from):
            raise UsageError(
                f"--resume-from {resume_from} is no complete checkpoint", "name a folder such as out/name/checkpoints/step-100"
            )
        _same_recipe(resume_from.parent.parent, recipe)
        return resume_from
    if not resume:
        return None
    _same_recipe(folder, recipe)
    if _finished(folder):
        return None
    checkpoint = run_folder.newest_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(f"{folder} holds no complete checkpoint to resume from", "start anew with --overwrite")
    return checkpoint


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended."""
    return run_folder.read_record(folder).get("summary")


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume with a recipe that would train something else."""
    before = _flat(run_folder.read_record(folder).get("recipe") or {})
    now = _flat(recipe.model_dump(mode="json"))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differing = [key for key in differing if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)]
    if differing:
        lines = "\n".join(f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differing)
        raise UsageError(
            f"the run in {folder} was made by another recipe:\n{lines}",
            "resume with the recipe it was made by, or start a new run with another --output-dir",
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{path}.{name}".strip(".")).items()}
