"""From a recipe to the parts of a run: devices, data, model, components, optimizer, rank control."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration

from dynlora_cli import plugins
from dynlora_cli.adapters.new_tokens import add_new_tokens, put_new_tokens, untaught
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.earlier import earlier_data
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.replay import Earlier, add_replay
from dynlora_cli.data.rows.kept import PromptsOf
from dynlora_cli.data.rows.sequences import joined
from dynlora_cli.data.splits import LEAST_SIZING_ROWS, sizing_rows
from dynlora_cli.errors import DataError, MachineError, UsageError
from dynlora_cli.evaluation.also import Reading, row_sets
from dynlora_cli.evaluation.held_out_loss import held_out, row_sums
from dynlora_cli.execution.accelerator import RunAccelerator
from dynlora_cli.execution.mode import Modes
from dynlora_cli.extras import install
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.whole import Trained
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.experts import fused_experts
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.models.load import Base, bf16_note, load_base, own_classes, quantized_to, resolve_dtype
from dynlora_cli.models.randomness import Randomness
from dynlora_cli.pruning.control import Control, NoControl, RankControl
from dynlora_cli.pruning.row_fisher import weights_note
from dynlora_cli.pruning.schedule import SHORTEST, Schedule
from dynlora_cli.pruning.stopping import EarlyStopping
from dynlora_cli.runs.folder import read_record
from dynlora_cli.tasks import objective as objectives
from dynlora_cli.tasks import task as tasks
from dynlora_cli.tasks.loss import evaluating, summed_loss
from dynlora_cli.text import counted, size
from dynlora_cli.training import samples
from dynlora_cli.training.batches import make_batches, on_device, passes_note, run_batches, total_steps
from dynlora_cli.training.optimizers import check_optimizer, make_optimizer
from dynlora_cli.training.replay import runs_to_replay
from dynlora_cli.training.routers import read_own_rows, reads_own_rows
from dynlora_cli.training.run import Progress, Run

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.sections import Model
    from dynlora_cli.evaluation.also import RowSet
    from dynlora_cli.pruning.policy import Policy
    from dynlora_cli.tasks.task import Task

MEASURED_ROWS = 8


def make_accelerator(recipe: Recipe, folder: Path, modes: Modes) -> Accelerator:
    """Devices, precision and trackers.

    Raises:
        MachineError: a tracker's package is not installed, or the device cannot train in the recipe's dtype or with its
            optimizer.
    """
    for name in recipe.train.report_to:
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"train.report_to: the package {name} is not installed", install(name))
        importlib.import_module(name)  # if it is broken, better now than when all is loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_optimizer(recipe.train.optimizer, device)
    dtype = resolve_dtype(recipe.model.dtype, device)
    return RunAccelerator(
        cpu=device.type == "cpu",  # without it, several processes on CPUs would each train alone
        mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
        log_with=list(recipe.train.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        kwargs_handlers=[
            AutocastKwargs(cache_enabled=modes.keeps_casts),
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.train.ddp_timeout)),
        ],
    )


def read_data(
    recipe: Recipe,
    files: BaseFiles,
    writing: Writing | None = None,
    before: Mapping[str, Any] | None = None,
    load: Callable[..., Data] = load_data,
    tell: Callable[[str], None] = lambda _: None,
) -> Data:
    """The rows of a run as tokens, none longer than the model's context.

    Args:
        recipe: of the run.
        files: of its base model, whose tokenizer is used; it gets the run's new tokens.
        writing: how rows are written, of a run that goes on; None: as today.
        before: the record of a run that is resumed.
        load: reads the rows; what it remembers must be the same as reading them again.
        tell: takes sentences for the person who waits, while rows are read.
    """
    files.refuse_fixed_lengths()
    add_new_tokens(recipe, files, before)
    tokenizer, context, task = files.tokenizer, files.context_length, tasks.of(recipe.model, recipe.train)
    if reads_own_rows(recipe):
        return read_own_rows(recipe, files, task)
    earlier = [_earlier(folder, files, task) for folder in runs_to_replay(recipe)]
    data = load(
        recipe.dataset,
        tokenizer,
        task=task,
        seed=recipe.seed,
        max_length=context,
        num_labels=recipe.model.num_labels,
        sizing=sizing_rows(recipe),
        writing=writing,
        table=files.table_rows,
        own_classes=own_classes(recipe.model, files) if task.has_classes else None,
        tell=tell,
    )
    if len(data.train) == 1 and not data.kind.renewed:
        raise DataError(
            "dataset.train: one row is all there is to learn from, which teaches a model no more than to repeat it",
            "add rows, or lower dataset.val_size" if data.val else "add rows",
        )
    if recipe.dataset.replay:
        add_replay(data, earlier, recipe.dataset.replay.share)
    data.prior, said = task.prior(recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps)
    data.notes += said
    if recipe.dataset.retrieve is None or recipe.pruning.policy == "retrieval":  # whose confidences nobody asked for
        data.notes += weights_note(recipe.pruning.policy, recipe.pruning, joined(data.train, data.replayed))
    if context is not None and context < recipe.dataset.max_length:
        data.notes.append(f"dataset.max_length {recipe.dataset.max_length} is cut to the model's context, {context}")
    return data


def read_also(recipe: Recipe, files: BaseFiles, data: Data) -> list[RowSet]:
    """The rows of `eval.also`; adds to the notes of the run's data what there is to say of them."""
    task = tasks.of(recipe.model)  # what else a model can do is a matter of likelihood, whatever it learns now
    reading = Reading(files.tokenizer, task, data.writing, data.labels, files.table_rows, files.context_length)
    trained = sum((data.prompts[part] for part in ("train", "replayed") if part in data.prompts), PromptsOf())
    return row_sets(recipe, reading, data.notes, trained=trained)


def _earlier(folder: Path, files: BaseFiles, task: Task) -> Earlier:
    """An earlier run on the same base, with its rows.

    Raises:
        UsageError: its base was another model, or its rows cannot be read again.
    """
    before = (read_record(folder).get("base_model") or {}).get("fingerprint")
    if before and (what := changed_since(before, files.folder, files.config)):
        raise UsageError(
            f"dataset.replay: the run in {folder} was trained on another model than {files.folder}: {what}",
            "name a run on the same model, or leave dataset.replay out",
        )
    return Earlier(
        folder, earlier_data(folder, files.tokenizer, task, table=files.table_rows, context=files.context_length)
    )


def read_base(
    recipe: Recipe,
    files: BaseFiles,
    data: Data,
    device: torch.device,
    modes: Modes,
    load: Callable[..., Base] = load_base,
) -> Base:
    """The frozen model, ready for components; on the device "meta" only its structure. `load`: as `load_base`."""
    base = load(
        recipe.model,
        files,
        files.tokenizer,
        device=modes.loads_to(device),
        labels=data.labels,
        seed=recipe.seed,
        computes=device,
    )
    data.notes += _kept_in_full(recipe.model, base)
    if plugins.declared("variants", recipe.adapter.variant, "has_components"):  # weights that train need fp32
        data.notes += bf16_note(recipe.model, base, device)
    modes.prepare(base.model)
    if files.new is not None:
        data.notes += [*put_new_tokens(base, recipe.adapter), *untaught(files.new, data)]
    return base


def _kept_in_full(options: Model, base: Base) -> list[str]:
    """A note on experts beside 4 or 8 bits: bitsandbytes quantizes linear layers, which they are not."""
    bits = quantized_to(options)
    held = [p for name in fused_experts(base.model) for p in base.model.get_submodule(name).parameters(recurse=False)]
    if not bits or not held:
        return []
    kept = size(sum(parameter.numel() for parameter in held) * base.dtype.itemsize)
    return [f"model.{bits}: the experts are no linear layers and stay as they are, {kept} of the base's memory"]


def make_schedule(recipe: Recipe, steps: int, start: Start) -> Schedule:
    """The pruning events of the run."""
    plan = Schedule.descend if start.open else Schedule.plan
    begin, end = recipe.pruning_window
    return plan(
        total_steps=steps,
        start=begin,
        end=end,
        events=recipe.pruning.events,
        parameters=start.parameters,
        budget=start.budget,
    )


def why_unpruned(steps: int, start: Start) -> list[str]:
    """A note where nothing will be pruned: the budget is out of reach, or the run too short to prune down to it."""
    if start.parameters < start.budget and not start.open:
        there = f"there are {start.parameters:,} parameters, and the budget is {start.budget:,}"
        return [f"rank.budget: {there}: nothing will be pruned; a smaller budget prunes"]
    if steps >= SHORTEST or (start.parameters == start.budget and not start.open):
        return []
    return [
        f"{counted(steps, 'step')}: too few to prune (at least {SHORTEST}), so all components stay, more than the "
        "budget; raise train.epochs or train.max_steps, or set rank.init to rank.budget"
    ]


def make_run(
    recipe: Recipe,
    accelerator: Accelerator,
    base: Base,
    data: Data,
    trained: Trained,
    start: Start | None,
    modes: Modes,
    *,
    save: Callable[[Run], None],
    also: Sequence[RowSet] = (),
) -> Run:
    """Optimizer, rank control and batches around the model; `also` are rows of other kinds, to be measured on."""
    objective = objectives.begun(recipe.train, trained)
    objectives.hang(objective, joined(data.train, data.val, data.sizing, data.replayed))
    groups = trained.groups(base.model)
    optimizer = make_optimizer(recipe.train.optimizer, groups, recipe.train.weight_decay)
    batches = run_batches(recipe, data, base, accelerator)
    steps = total_steps(recipe, batches)
    data.notes += passes_note(recipe.train, batches, watched=bool(data.val))
    control: Control = NoControl()
    if start and isinstance(trained, Pool):
        data.notes += why_unpruned(steps, start)
        control = RankControl(
            trained,
            optimizer,
            cast("Policy", plugins.load("policies", recipe.pruning.policy)),
            make_schedule(recipe, steps, start),
            options=recipe.pruning,
            seed=recipe.seed,
            gauge=recipe.pruning.gauge,
            lr_coupling=recipe.pruning.lr_coupling,
            loss_now=None if start.open else _loss_now(recipe, accelerator, base, data),
            stopping=_early_stopping(recipe, accelerator, base, data) if start.open else None,
        )
    val = data.val[: recipe.eval.max_samples]
    rate = recipe.train.learning_rate
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        base=base,
        data=data,
        start=start,
        trained=trained,
        optimizer=optimizer,
        control=control,
        batches=batches,
        val_batches=make_batches(recipe, val, base, shuffle=False, accelerator=accelerator) if val else None,
        total_steps=steps,
        save=save,
        progress=Progress(learning_rate=None if rate == "auto" else rate),
        modes=modes,
        # Dropout is the one thing that differs between processes.
        random=Randomness(recipe.seed + accelerator.process_index, accelerator.device),
        objective=objective,
        also=also,
        samples=samples.choose(recipe, base.tokenizer, val, modes, data.notes, data.train),
    )
    modes.begin(base.model, trained, partial(_first_batch, run), run.note)
    return run


def _first_batch(run: Run) -> None:
    """Run the model on the first batch of the run."""
    batch = run.batches.step(0, 0)[0].to(run.accelerator.device)
    if batch.judge is run.objective:  # whose reference has not been asked yet: what is run without it is the same
        batch = replace(batch, judge=None)
    with evaluating(run.model), run.accelerator.autocast():
        summed_loss(run.model, batch)


def _loss_now(recipe: Recipe, accelerator: Accelerator, base: Base, data: Data) -> Callable[[], float]:
    """The loss on a few fixed rows, no more than those of a step, for the change that an event makes."""
    rows = min(MEASURED_ROWS, recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps)
    batches = on_device(recipe, accelerator, base, (data.val or data.train)[:rows])
    return lambda: held_out(base.model, batches, autocast=accelerator.autocast)["loss"]


def _early_stopping(recipe: Recipe, accelerator: Accelerator, base: Base, data: Data) -> EarlyStopping:
    """What stops the pruning of an automatic budget: the loss of every row that was held out for it.

    Raises:
        UsageError: too few such rows to tell anything.
    """
    if len(data.sizing) < LEAST_SIZING_ROWS:
        raise UsageError(
            f"rank.budget: auto holds out a tenth of the training rows to choose by, which here is {len(data.sizing)}; "
            f"at least {LEAST_SIZING_ROWS} are needed",
            "add rows (with other prompts), or write a number",
        )
    batches = on_device(recipe, accelerator, base, data.sizing)
    return EarlyStopping(lambda: row_sums(base.model, batches, autocast=accelerator.autocast), recipe.pruning.tolerance)
