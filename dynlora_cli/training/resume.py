"""Going on with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.resume import same_recipe
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.load import Data
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import swap
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, note, send
from dynlora_cli.runs.record import Record
from dynlora_cli.training.checkpoint import fault_in, read_state, restore
from dynlora_cli.training.run import Progress, Run

if TYPE_CHECKING:
    from accelerate import Accelerator


RESTART = "bring it back as it was, or start a new run with another --output-dir"


def find_checkpoint(
    folder: Path, recipe: Recipe, resume: bool, resume_from: Path | None, listener: Emit | None = None
) -> Path | None:
    """The checkpoint to go on with; None for a new run, and with `resume` for one that is finished.

    Raises:
        UsageError: nothing to resume, or the recipe is another one.
    """
    if resume_from is not None:
        run = run_folder.run_of(resume_from)
        fault = run_folder.fault_of(resume_from) or fault_in(resume_from, run_folder.read_record(run))
        if fault:
            others = [path for path in run_folder.step_folders(run) if not run_folder.fault_of(path)]
            example = f"take {others[-1]}" if others else "name a folder such as out/name/checkpoints/step-100"
            raise UsageError(f"--resume-from: no complete checkpoint: {resume_from} {fault}", example)
        same_recipe(run, recipe)
        return resume_from
    if not resume:
        return None
    same_recipe(folder, recipe)
    record = run_folder.read_record(folder)
    faults: list[str] = []
    if "summary" in record:
        return None
    for checkpoint in reversed(run_folder.step_folders(folder)):
        fault = fault_in(checkpoint, record)
        if fault is None:
            if faults:
                text = f"{'; '.join(faults)}; {checkpoint.name} is the newest that can be gone on with"
                send(listener, note(text))
            return checkpoint
        faults.append(f"{checkpoint} {fault}")
    lines = "".join(f"\n  {fault}" for fault in faults)
    raise UsageError(f"{folder} holds no complete checkpoint to resume from{lines}", "start anew with --overwrite")


def writing(before: Mapping[str, Any] | None, accelerator: Accelerator) -> Writing:
    """How a run writes its rows, in all processes alike: as it began to, by its record."""
    first = [Writing() if before is None else Writing.of(before)]
    if accelerator.num_processes > 1:
        broadcast_object_list(first)
    return first[0]


def same_inputs(folder: Path, before: Mapping[str, Any], data: Data, files: BaseFiles) -> None:
    """Refuse to resume on other rows or weights: the steps already done would not be the ones on record.

    Args:
        folder: of the run that goes on.
        before: its record.
        data: its rows, as they are now.
        files: of its base model.
    """
    if before["data"]["sha256"] != data.sha256:
        raise UsageError(f"the rows, or how they are read, have changed since the run in {folder} began", RESTART)
    if _replayed(before["data"].get("replay")) != _replayed(data.replay):
        raise UsageError(f"the rows that the run in {folder} replays are other ones than when it began", RESTART)
    if changed_since(before["base_model"]["fingerprint"], files.folder, files.config):
        raise UsageError(f"the model in {files.folder} has changed since the run in {folder} began", RESTART)


def _replayed(replay: Mapping[str, Any] | None) -> list[tuple[Any, Any]]:
    """What identifies replayed rows: how many of each run, and their hash."""
    return [(run.get("draws"), run.get("sha256")) for run in (replay or {}).get("runs") or ()]


def go_back_to(checkpoint: Path, training: Run, folder: Path, record: Record) -> None:
    """Put the run, and the files in its folder, where they were at a checkpoint."""
    position, tensors = read_state(checkpoint)
    if isinstance(training.trained, Pool):
        empty = torch.zeros(position["parameters"], device=training.accelerator.device)
        swap(training.trained, training.optimizer, empty, position["counts"], {})
    with training.random:
        averages = restore(tensors, training.parameters, training.optimizer)
    training.control.load_state_dict(averages)
    training.objective.load_state_dict(averages)
    if training.accelerator.scaler:
        training.accelerator.scaler.load_state_dict(position["scaler"])
    training.progress = Progress(**({"learning_rate": training.progress.learning_rate} | position["progress"]))
    if training.stream:
        training.stream.go_to(position["stream"])
    training.trained.stand_after(training.progress.step, training.total_steps)
    best = _best_so_far(checkpoint, training.progress, record)
    if training.accelerator.is_main_process:
        run_folder.rewind(folder, checkpoint, best, record)


def _best_so_far(checkpoint: Path, progress: Progress, record: Record) -> Path | None:
    """The best checkpoint up to this one; where its folder is gone, the search for the best begins anew."""
    if not progress.best:
        return None
    best = checkpoint.parent / f"step-{progress.best['step']}"
    if fault_in(best, record) is None:
        return best
    progress.best, progress.evaluations_since_best = None, 0
    return None
