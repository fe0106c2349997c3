"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents, `plan` the same without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list

from dynlora_cli import drawers, outputs, run_folder
from dynlora_cli.adapter_base import Place
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
from dynlora_cli.chat_template import Writing
from dynlora_cli.checkpoint import read_state, restore
from dynlora_cli.compile_blocks import compile_blocks, graphs_made
from dynlora_cli.components import linear_shape
from dynlora_cli.cuda_graphs import BlockGraphs, prepare, refuse_without_gpu
from dynlora_cli.data import Data, show_example
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.loop import fit
from dynlora_cli.memory import measure
from dynlora_cli.model import Base, fingerprint, resolve_dtype
from dynlora_cli.model_folder import find_model
from dynlora_cli.peft_check import read_back
from dynlora_cli.rank import Start, swap
from dynlora_cli.rate_search import rate_share
from dynlora_cli.recipe import to_yaml
from dynlora_cli.report import RunLog
from dynlora_cli.schedule import Schedule
from dynlora_cli.sharding import refuse_sharding, shard_base
from dynlora_cli.starts import begin
from dynlora_cli.state import Progress, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dynlora_cli.recipe import Recipe
    from dynlora_cli.variants._variant import Variant

RESTART = "bring it back as it was, or start a new run with another --output-dir"
# What may differ when a run is resumed: it changes what is shown and kept, not what is learned.
FREE_ON_RESUME = ("output_dir", "train.cuda_graphs", "train.log_steps", "train.save_steps", "train.report_to")


def run(
    recipe: Recipe,
    *,
    listener: Emit | None = None,
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
    checkpoint = find_checkpoint(folder, recipe, resume, resume_from)
    if checkpoint is None and resume:
        _tell(listener, {"event": "note", "text": f"{folder} is finished already; nothing to do"})
        return run_folder.read_record(folder)["summary"]
    begins = checkpoint is None or run_folder.run_of(checkpoint) != folder.resolve()
    if begins:
        run_folder.refuse_occupied(folder, overwrite=overwrite)
    accelerator = make_accelerator(recipe, folder)
    if recipe.train.shard_base:
        refuse_sharding(accelerator.num_processes)
    if recipe.train.cuda_graphs:
        refuse_without_gpu(accelerator.device)
    tokenizer, data = read_data(recipe, _writing(checkpoint, accelerator))
    if checkpoint:
        _same_inputs(run_folder.run_of(checkpoint), data, recipe)
    base = read_base(recipe, tokenizer, data, accelerator.device)
    variant = cast("Variant", drawers.load("variants", recipe.adapter.variant))
    pool, start = begin(recipe, variant, base, data, accelerator, _first_counts(checkpoint))
    if recipe.train.shard_base and pool:
        shard_base(base.model, pool, accelerator.device, accelerator.num_processes)
    save = partial(outputs.write_checkpoint, folder=folder, base=base)
    training = make_run(recipe, accelerator, base, data, pool, start, save=save)
    if recipe.train.compile:  # not before the model was asked about packed rows, in another precision
        compile_blocks(base.model, pool)
    if recipe.train.cuda_graphs and pool:
        prepare(base.model, recipe.train.gradient_checkpointing is not False)
        training.graphs = BlockGraphs(base.model, pool, lambda text: training.emit({"event": "note", "text": text}))
    # Dropout is the one thing that differs between processes.
    torch.manual_seed(recipe.seed + accelerator.process_index)
    record = outputs.start_record(recipe, training, base, data, start)
    if begins and accelerator.is_main_process:
        run_folder.claim(folder, overwrite=overwrite)
    if checkpoint:
        _go_back_to(checkpoint, training, folder)
    with _log(training, folder, listener):
        outputs.write_record(folder, record, training)
        training.emit(outputs.start_event(recipe, training, base, data, start))
        if checkpoint:
            training.emit({"event": "note", "text": f"resuming from {checkpoint}"})
        accelerator.init_trackers(folder.name, config=_plain(recipe))
        fit(training)
        if recipe.train.compile:
            training.emit({"event": "note", "text": f"torch.compile made {graphs_made()} graphs"})
        if training.graphs:
            recorded, played = training.graphs.recorded, training.graphs.played
            text = f"passes through the blocks were recorded {recorded} times and played {played} times"
            training.emit({"event": "note", "text": text})
        kind = outputs.write_root(folder, training, base)
        summary = outputs.summarize(recipe, training, start, folder, kind)
        if pool and accelerator.is_main_process:
            summary["peft_check"] = _read_back(recipe, training, base, data, folder)
        outputs.finish(folder, record, training, summary)
        training.emit({"event": "end", "summary": summary})
    accelerator.end_training()
    if problem := (summary.get("peft_check") or {}).get("problem"):
        raise MeasureError(
            f"stock PEFT does not compute what was trained: {problem}",
            f"the adapter is kept in {folder}, and `dynlora merge` makes a plain model of it; please report this",
        )
    return summary


def _read_back(recipe: Recipe, training: Run, base: Base, data: Data, folder: Path) -> dict[str, Any]:
    """What PEFT makes of the adapter in the run's root; a note where nobody knows."""
    assert training.pool is not None
    if recipe.train.shard_base:
        found: dict[str, Any] = {"checked": False, "reason": "a sharded base is not read back through PEFT"}
    else:
        place = Place(recipe.model, base.folder, data.labels, chosen=False)
        layers = [name for name, layer in training.pool.layers.items() if layer.count]
        found = read_back(place, base.model, base.tokenizer, folder, layers, training.accelerator.autocast)
    if not found["checked"]:
        training.emit({"event": "note", "text": found["reason"]})
    return found


@contextmanager
def _log(training: Run, folder: Path, listener: Emit | None) -> Iterator[None]:
    """Events go to the run's files and to the listener; other processes than the main one are silent."""
    if not training.accelerator.is_main_process:
        yield
        return
    with RunLog(folder, keep_until_step=training.progress.step) as log:

        def emit(event: dict[str, Any]) -> None:
            log(event)
            _tell(listener, event)

        training.emit = emit
        yield


def _tell(listener: Emit | None, event: dict[str, Any]) -> None:
    if listener:
        listener(event)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do, found without loading weights and without writing anything.

    Returns:
        recipe_yaml, example, modules, parameters, schedule, steps, data, memory and notes; see console_plan.py.
    """
    keep_libraries_quiet()
    tokenizer, data = read_data(recipe)
    base = read_base(recipe, tokenizer, data, torch.device("meta"))
    steps = total_steps(recipe, make_batches(recipe, data.train, base, shuffle=True))
    found: dict[str, Any] = {
        "recipe_yaml": to_yaml(recipe),
        "example": show_example(data.train[0], tokenizer),
        "parameters": {"base": base.model.num_parameters()},
        "modules": [],
        "schedule": [],
        "steps": steps,
        "data": {"counts": data.counts, "sha256": data.sha256},
        "notes": data.notes,
    }
    variant = cast("Variant", drawers.load("variants", recipe.adapter.variant))
    if not variant.has_components:
        return found | _memory(recipe, variant, base, data)
    targets, start = plan_ranks(recipe, base)
    if recipe.rank.allocation != "uniform":
        data.notes.append(f"rank.allocation: {recipe.rank.allocation} needs the model's data; shown is uniform")
    found["modules"] = [
        dict(
            zip(("name", "d_in", "d_out", "components"), (name, *linear_shape(module), start.counts[name]), strict=True)
        )
        for name, module in targets.items()
    ]
    found["parameters"].update(start=start.parameters, budget=start.limit)
    found["schedule"] = _planned_events(recipe, steps, start, make_schedule(recipe, steps, start))
    return found | _memory(recipe, variant, base, data)


def _memory(recipe: Recipe, variant: Variant, base: Base, data: Data) -> dict[str, Any]:
    """The memory that the run will need, or a note why nobody knows; `base` is used up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = replace(base, dtype=resolve_dtype(recipe.model.dtype, device))
    length = recipe.dataset.max_length if recipe.dataset.packing else max(e.longest for e in data.train)
    ids = (recipe.train.micro_batch_size, length)
    try:
        need = measure(
            base, lambda: attach(variant, base, recipe)[0], recipe.model, device, ids, recipe.train.optimizer
        )
    except (RuntimeError, NotImplementedError) as error:  # an operation of the model that needs numbers
        return {"notes": [*data.notes, f"memory was not estimated: {str(error).strip().splitlines()[0]}"]}
    found: dict[str, Any] = {"memory": need.as_dict()}
    if recipe.train.shard_base:
        data.notes.append("train.shard_base: the memory is that of a base which nobody shares; --devices N divide it")
    if need.rows > need.most_rows:
        advice = f"lower train.micro_batch_size to {need.most_rows}, " if need.most_rows else ""
        advice += "set train.gradient_checkpointing: true or model.load_in_4bit: true, or lower dataset.max_length"
        found["notes"] = [*data.notes, f"this may not fit into memory: {advice}"]
    return found


def _planned_events(recipe: Recipe, steps: int, start: Start, schedule: Schedule) -> list[dict[str, Any]]:
    """The parameters and the average rank alive after each event, and the learning rate that follows them."""
    highest = None if recipe.train.learning_rate == "auto" else recipe.train.learning_rate
    alive = [(0, start.parameters), *zip(schedule.steps, schedule.targets, strict=True)]
    return [
        {
            "step": step,
            "parameters": parameters,
            "rank": start.rank_of(parameters),
            "learning_rate": highest
            and highest
            * rate_share(step + 1, steps, recipe.train)
            * (start.parameters / parameters) ** recipe.pruning.lr_coupling,
        }
        for step, parameters in alive
    ]


# -- resuming --------------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path, recipe: Recipe, resume: bool, resume_from: Path | None) -> Path | None:
    """The checkpoint to go on with; None for a new run, and with `resume` for one that is finished.

    Raises:
        UsageError: nothing to resume, or the recipe is another one.
    """
    if resume_from is not None:
        if not run_folder.is_whole(resume_from):
            raise UsageError(
                f"--resume-from {resume_from} is no complete checkpoint",
                "name a folder such as out/name/checkpoints/step-100",
            )
        _same_recipe(run_folder.run_of(resume_from), recipe)
        return resume_from
    if not resume:
        return None
    _same_recipe(folder, recipe)
    if "summary" in run_folder.read_record(folder):
        return None
    checkpoint = run_folder.newest_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(f"{folder} holds no complete checkpoint to resume from", "start anew with --overwrite")
    return checkpoint


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume with a recipe that would train something else."""
    before = _flat(run_folder.read_record(folder).get("recipe") or {})
    now = _flat(recipe.model_dump(mode="json"))
    differing = [key for key in now | before if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME)]
    if differing:
        lines = "\n".join(f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in sorted(differing))
        raise UsageError(
            f"the run in {folder} was made by another recipe:\n{lines}",
            "resume with the recipe it was made by, or start a new run with another --output-dir",
        )


def _writing(checkpoint: Path | None, accelerator: Accelerator) -> Writing:
    """How the run began to write its rows, in all processes alike."""
    first = [Writing.of(run_folder.read_record(run_folder.run_of(checkpoint))) if checkpoint else Writing()]
    if accelerator.num_processes > 1:
        broadcast_object_list(first)
    return first[0]


def _same_inputs(folder: Path, data: Data, recipe: Recipe) -> None:
    """Refuse to resume on other rows or weights: the steps already done would not be the ones on record."""
    before, (model, _) = run_folder.read_record(folder), find_model(recipe.model)
    if before["data"]["sha256"] != data.sha256:
        raise UsageError(f"the rows, or how they are read, have changed since the run in {folder} began", RESTART)
    recorded, now = before["base_model"]["fingerprint"], fingerprint(model)
    if any(recorded.get(key) != now[key] for key in ("sha256", "sampled_sha256")):
        raise UsageError(f"the model in {model} has changed since the run in {folder} began", RESTART)


def _go_back_to(checkpoint: Path, training: Run, folder: Path) -> None:
    """Put the run, and the files in its folder, where they were at a checkpoint."""
    position, tensors = read_state(checkpoint)
    if training.pool:
        empty = torch.zeros(position["parameters"], device=training.accelerator.device)
        swap(training.pool, training.optimizer, empty, position["counts"], {})
    averages = restore(tensors, training.parameters, training.optimizer)
    if training.control:
        training.control.load_state_dict(averages)
    if training.accelerator.scaler:
        training.accelerator.scaler.load_state_dict(position["scaler"])
    training.progress = Progress(**({"learning_rate": training.progress.learning_rate} | position["progress"]))
    if training.pool:
        training.pool.stand_after(training.progress.step, training.total_steps)
    if rank := training.accelerator.process_index:  # the generators in a checkpoint are those of the main process
        torch.manual_seed(training.recipe.seed + rank + 1_000_003 * training.progress.step)
    best = _best_so_far(checkpoint, training.progress)
    if training.accelerator.is_main_process:
        run_folder.rewind(folder, checkpoint, best)


def _first_counts(checkpoint: Path | None) -> dict[str, int] | None:
    """The components that a run began with, for one that goes on; None for a new one."""
    if checkpoint is None:
        return None
    budget = run_folder.read_record(run_folder.run_of(checkpoint))["budget"]
    return budget and budget["start_components"]


def _best_so_far(checkpoint: Path, progress: Progress) -> Path | None:
    """The best checkpoint at the time of this one; where it is gone, the search for the best begins anew."""
    if not progress.best:
        return None
    best = checkpoint.parent / f"step-{progress.best['step']}"
    if run_folder.is_whole(best):
        return best
    progress.best, progress.evaluations_since_best = None, 0
    return None


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: dotted keys, plain values."""
    flat = _flat(recipe.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in flat.items()}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for name, child in tree.items() for k, v in _flat(child, f"{path}.{name}".strip(".")).items()}
