"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from dynlora_cli import plugins
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.execution.modes.compile import compile_blocks, graphs_made
from dynlora_cli.execution.modes.cuda_graphs import BlockGraphs, prepare, refuse_without_gpu
from dynlora_cli.execution.modes.shard import refuse_sharding, shard_base
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.runs.events import Emit
from dynlora_cli.training.components import begin
from dynlora_cli.training.loop import fit
from dynlora_cli.training.run import Run
from dynlora_cli.training.session import Finished, Session
from dynlora_cli.training.setup import make_run, read_base, read_data

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dynlora_cli.lora.variant import Variant
    from dynlora_cli.lora.whole import Trained
    from dynlora_cli.models.load import Base


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
        listener: takes every event of the run, see runs/events.py.
        overwrite: replace an earlier run in the output folder.
        resume: go on with the newest valid checkpoint of the output folder.
        resume_from: go on with this checkpoint folder.

    Returns:
        The summary, as data.

    Raises:
        DynloraError: with the exit code that fits.
    """
    with Session.open(recipe, listener, overwrite=overwrite, resume=resume, resume_from=resume_from) as session:
        if isinstance(session, Finished):
            return session.summary
        _refuse_modes(recipe, session.accelerator)
        files = BaseFiles.find(recipe.model)
        data = read_data(recipe, files, session.writing)
        session.refuse_other_inputs(data, files)
        base = read_base(recipe, files, data, session.accelerator.device)
        variant = cast("Variant", plugins.load("variants", recipe.adapter.variant))
        trained, start = begin(recipe, variant, base, data, session.accelerator, session.first_counts)
        _shard(recipe, base, trained, session.accelerator)
        training = make_run(recipe, session.accelerator, base, data, trained, start, save=session.save)
        _apply_modes(training)
        # Processes differ in their dropout and in nothing else.
        torch.manual_seed(recipe.seed + session.accelerator.process_index)
        with session.recording(training):
            fit(training)
            _report_modes(training)
            return session.finish(training)


# -- modes -----------------------------------------------------------------------------------------------------------


def _refuse_modes(recipe: Recipe, accelerator: Accelerator) -> None:
    if recipe.train.shard_base:
        refuse_sharding(accelerator.num_processes)
    if recipe.train.cuda_graphs:
        refuse_without_gpu(accelerator.device)


def _shard(recipe: Recipe, base: Base, trained: Trained, accelerator: Accelerator) -> None:
    if recipe.train.shard_base and isinstance(trained, Pool):
        shard_base(base.model, trained, accelerator.device, accelerator.num_processes)


def _apply_modes(training: Run) -> None:
    recipe, model, pool = training.recipe, training.model, training.trained
    if recipe.train.compile:  # only now: the check of packing has run the model in fp32
        compile_blocks(model, pool if isinstance(pool, Pool) else None)
    if recipe.train.cuda_graphs and isinstance(pool, Pool):
        prepare(model, recipe.train.gradient_checkpointing is not False)
        training.graphs = BlockGraphs(model, pool, lambda text: training.emit({"event": "note", "text": text}))


def _report_modes(training: Run) -> None:
    if training.recipe.train.compile:
        training.emit({"event": "note", "text": f"torch.compile made {graphs_made()} graphs"})
    if training.graphs:
        recorded, played = training.graphs.recorded, training.graphs.played
        text = f"passes through the blocks were recorded {recorded} times and played {played} times"
        training.emit({"event": "note", "text": text})
