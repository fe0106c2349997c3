"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from dynlora_cli import plugins
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.resume import flat
from dynlora_cli.data.load import Data
from dynlora_cli.evaluation.peft_check import NOT_CHECKED, read_back, tell
from dynlora_cli.execution.launch import is_main_process
from dynlora_cli.execution.modes.compile import compile_blocks, graphs_made
from dynlora_cli.execution.modes.cuda_graphs import BlockGraphs, prepare, refuse_without_gpu
from dynlora_cli.execution.modes.shard import refuse_sharding, shard_base
from dynlora_cli.files.place import OutputPlace
from dynlora_cli.models.load import Base
from dynlora_cli.models.place import Place
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, send
from dynlora_cli.runs.log import RunLog
from dynlora_cli.training import outputs
from dynlora_cli.training.components import begin
from dynlora_cli.training.loop import fit
from dynlora_cli.training.resume import find_checkpoint, first_counts, go_back_to, same_inputs, writing
from dynlora_cli.training.run import Run
from dynlora_cli.training.setup import make_accelerator, make_run, read_base, read_data

if TYPE_CHECKING:
    from dynlora_cli.lora.variant import Variant


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
        listener: takes every event of the run, see runs/log.py.
        overwrite: replace an earlier run in the output folder.
        resume: go on with the newest valid checkpoint of the output folder.
        resume_from: go on with this checkpoint folder.

    Returns:
        The summary, as data.

    Raises:
        DynloraError: with the exit code that fits.
    """
    folder = Path(recipe.output_dir)
    # Of several processes the first one writes.
    with run_folder.place_of(folder) if is_main_process() else nullcontext() as place:
        _tell_of_the_old(place, folder, listener)
        try:
            return _run(recipe, folder, place, listener, overwrite, resume, resume_from)
        except BaseException:
            if place:
                place.settle()
            _tell_of_the_old(place, folder, listener)
            raise


def _tell_of_the_old(place: OutputPlace | None, folder: Path, listener: Emit | None) -> None:
    """Say that an earlier run has come back, where the one that was to replace it ended too early."""
    if place and place.brought_back:
        place.brought_back = False
        text = f"{folder} is the earlier run again: the one that was to replace it ended before it had saved anything"
        send(listener, {"event": "note", "text": text})


def _run(
    recipe: Recipe,
    folder: Path,
    place: OutputPlace | None,
    listener: Emit | None,
    overwrite: bool,
    resume: bool,
    resume_from: Path | None,
) -> dict[str, Any]:
    """`run`, with the output folder as its own; None where another process has it."""
    checkpoint = find_checkpoint(folder, recipe, resume, resume_from, listener)
    if checkpoint is None and resume:
        made = place and outputs.write_pages(folder)
        text = "what was missing of its report is made" if made else "nothing to do"
        send(listener, {"event": "note", "text": f"{folder} is finished already; {text}"})
        return run_folder.read_record(folder)["summary"]
    before = run_folder.read_record(run_folder.run_of(checkpoint)) if checkpoint else None
    begins = checkpoint is None or run_folder.run_of(checkpoint) != folder.resolve()
    if begins and place:
        run_folder.refuse_occupied(folder, overwrite=overwrite)
    accelerator = make_accelerator(recipe, folder)
    if recipe.train.shard_base:
        refuse_sharding(accelerator.num_processes)
    if recipe.train.cuda_graphs:
        refuse_without_gpu(accelerator.device)
    tokenizer, data = read_data(recipe, writing(checkpoint, accelerator))
    if checkpoint:
        same_inputs(run_folder.run_of(checkpoint), data, recipe)
    base = read_base(recipe, tokenizer, data, accelerator.device)
    variant = cast("Variant", plugins.load("variants", recipe.adapter.variant))
    pool, start = begin(recipe, variant, base, data, accelerator, first_counts(checkpoint))
    if recipe.train.shard_base and pool:
        shard_base(base.model, pool, accelerator.device, accelerator.num_processes)
    name = outputs.identity(before)
    save = partial(_save, folder=folder, base=base, run=name, place=place)
    training = make_run(recipe, accelerator, base, data, pool, start, save=save)
    if recipe.train.compile:  # not before the model was asked about packed rows, in another precision
        compile_blocks(base.model, pool)
    if recipe.train.cuda_graphs and pool:
        prepare(base.model, recipe.train.gradient_checkpointing is not False)
        training.graphs = BlockGraphs(base.model, pool, lambda text: training.emit({"event": "note", "text": text}))
    # Dropout is the one thing that differs between processes.
    torch.manual_seed(recipe.seed + accelerator.process_index)
    record = outputs.start_record(recipe, training, base, data, start, name)
    if begins and place:
        place.keep_old()
        place.path.mkdir(exist_ok=True)  # an old one stays where it is a volume of a container
        outputs.write_record(folder, record, training)
    if checkpoint:
        go_back_to(checkpoint, training, folder, record)
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
    if "peft_check" in summary:
        tell(summary["peft_check"], folder, lambda event: send(listener, event))
    return summary


def _read_back(recipe: Recipe, training: Run, base: Base, data: Data, folder: Path) -> dict[str, Any]:
    """What PEFT makes of the adapter in the run's root."""
    assert training.pool is not None
    if recipe.train.shard_base:
        found: dict[str, Any] = {"checked": False, "reason": f"{NOT_CHECKED}: the base is sharded"}
    else:
        place = Place(recipe.model, base.folder, data.labels, chosen=False)
        layers = [name for name, layer in training.pool.layers.items() if layer.count]
        found = read_back(place, base.model, base.tokenizer, folder, layers, training.accelerator.autocast)
    if not found["checked"]:
        training.emit({"event": "note", "text": found["reason"]})
    return found


def _save(training: Run, *, folder: Path, base: Base, run: str | None, place: OutputPlace | None) -> None:
    """Write a checkpoint; with the first one of a run, the run that it replaces is given up."""
    outputs.write_checkpoint(training, folder=folder, base=base, run=run)
    if place:
        place.give_up_old()


@contextmanager
def _log(training: Run, folder: Path, listener: Emit | None) -> Iterator[None]:
    """Events go to the run's files and to the listener; other processes than the main one are silent."""
    if not training.accelerator.is_main_process:
        yield
        return
    with RunLog(folder, keep_until_step=training.progress.step) as log:

        def emit(event: dict[str, Any]) -> None:
            log(event)
            send(listener, event)

        training.emit = emit
        yield


# -- resuming --------------------------------------------------------------------------------------------------------


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: dotted keys, plain values."""
    values = flat(recipe.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
