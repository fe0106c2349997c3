"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents, `plan` the same without training."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dynlora_cli import __version__, drawers, run_folder
from dynlora_cli.adapter import PREFIX, lora_config, lora_tensors, write_adapter
from dynlora_cli.batches import Batches
from dynlora_cli.checkpoint import read_state, restore, write_state
from dynlora_cli.components import Pool, linear_shape
from dynlora_cli.data import Data, load_data, show_example
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.loop import Progress, Run, fit, learning_rate
from dynlora_cli.loss import held_out
from dynlora_cli.model import (
    Base,
    context_length,
    find_model,
    find_targets,
    fingerprint,
    load_base,
    load_tokenizer,
    resolve_dtype,
)
from dynlora_cli.rank import RankControl, Schedule, Start, plan_start
from dynlora_cli.recipe import to_yaml
from dynlora_cli.report import write_card, write_report
from dynlora_cli.report_log import RunLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.recipe import Recipe

SCHEMA_VERSION = 1
PROBE_ROWS = 8
# What may differ when a run is resumed: it changes what is shown and kept, not what is learned.
FREE_ON_RESUME = {"output_dir", "train.log_steps", "train.save_steps", "train.report_to"}
Emit = Callable[[dict[str, Any]], None]


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


# -- before training -------------------------------------------------------------------------------------------------


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


def _accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Devices, precision and trackers.

    Raises:
        MachineError: a tracker's package is not installed.
    """
    for name in recipe.train.report_to:
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"train.report_to: the package {name} is not installed", f'pip install "dynlora[{name}]"')
    _quiet()
    AcceleratorState._reset_state()  # one process may train several times, each with its own precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(recipe.model.dtype, device)
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    trackers: list[Any] = list(recipe.train.report_to)
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=folder)
    if trackers:
        config = {key: value for key, value in _flat(recipe.model_dump(mode="json")).items()}
        settings = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in config.items()}
        accelerator.init_trackers(folder.name, config=settings)
    return accelerator


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of our output; warnings of ours are events."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Data]:
    folder, _ = find_model(recipe.model)
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    context = context_length(folder)
    data = load_data(
        recipe.dataset,
        tokenizer,
        task=recipe.model.task,
        seed=recipe.seed,
        max_length=context,
        num_labels=recipe.model.num_labels,
    )
    if context is not None and context < recipe.dataset.max_length:
        data.notes.append(f"dataset.max_length is cut from {recipe.dataset.max_length} to the model's context, {context}")
    return tokenizer, data


def _load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, labels: list[str] | None) -> Base:
    return load_base(
        recipe.model,
        tokenizer,
        device=device,
        labels=labels,
        seed=recipe.seed,
        checkpointing=recipe.train.gradient_checkpointing,
    )


def _attach(variant: ModuleType, base: Base, recipe: Recipe) -> tuple[Pool | None, Start | None]:
    """Put components on the model, or make all of it train."""
    if not variant.has_components:
        base.model.requires_grad_(True)
        return None, None
    targets = find_targets(base.model, recipe.adapter.target_modules, head=base.head)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    start = plan_start(shapes, recipe.rank.parsed_budget(), recipe.rank.init)
    return variant.attach(base.model, targets, start, recipe), start


def _batches(
    recipe: Recipe,
    examples: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    shuffle: bool,
    accelerator: Accelerator | None = None,
) -> Batches:
    train = recipe.train
    return Batches(
        examples,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.gradient_accumulation_steps,
        seed=recipe.seed,
        max_length=recipe.dataset.max_length,
        pad_id=tokenizer.pad_token_id,
        packing=recipe.dataset.packing,
        shuffle=shuffle,
        shards=accelerator.num_processes if accelerator else 1,
        shard=accelerator.process_index if accelerator else 0,
    )


def _total_steps(recipe: Recipe, batches: Batches) -> int:
    return recipe.train.max_steps or max(1, round(recipe.train.epochs * batches.steps_per_epoch))


def _schedule(recipe: Recipe, total_steps: int, start: Start) -> Schedule:
    return Schedule.plan(
        total_steps=total_steps,
        start=recipe.pruning.start,
        end=recipe.pruning.end,
        events=recipe.pruning.events,
        parameters=start.parameters,
        budget=start.budget,
    )


def _assemble(
    recipe: Recipe,
    accelerator: Accelerator,
    base: Base,
    data: Data,
    pool: Pool | None,
    start: Start | None,
    emit: Emit,
) -> Run:
    """Optimizer, rank control and batches around the model."""
    rest = [p for p in base.model.parameters() if p.requires_grad]
    if pool:
        leaves = {id(p) for layer in pool.layers.values() for p in (layer.a_CI, layer.b_OC)}
        rest = [p for p in rest if id(p) not in leaves]
    groups: list[dict[str, Any]] = [{"params": [pool.values], "coupled": True}] if pool else []
    if rest:
        groups.append({"params": rest, "coupled": False})
    optimizer = torch.optim.AdamW(groups, lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay)
    batches = _batches(recipe, data.train, base.tokenizer, shuffle=True, accelerator=accelerator)
    val = data.val[: recipe.eval.max_samples] if recipe.eval.max_samples else data.val
    total_steps = _total_steps(recipe, batches)
    control = None
    if pool and start:
        policy = drawers.load("policies", recipe.pruning.policy).Policy(recipe.seed)
        probe_rows = _batches(recipe, (data.val or data.train)[:PROBE_ROWS], base.tokenizer, shuffle=False).step(0, 0)
        probe_rows = [batch.to(accelerator.device) for batch in probe_rows]

        def probe() -> float:
            return held_out(base.model, probe_rows, autocast=accelerator.autocast)["loss"]

        control = RankControl(
            pool,
            optimizer,
            policy,
            _schedule(recipe, total_steps, start),
            gauge=recipe.pruning.gauge,
            lr_coupling=recipe.pruning.lr_coupling,
            probe=probe,
        )
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        model=base.model,
        optimizer=optimizer,
        pool=pool,
        control=control,
        batches=batches,
        val_batches=_batches(recipe, val, base.tokenizer, shuffle=False, accelerator=accelerator) if val else None,
        total_steps=total_steps,
        emit=emit,
        save=lambda run: None,
    )


def _seed_dropout(recipe: Recipe, accelerator: Accelerator, *, fresh: bool) -> None:
    """Dropout differs between processes; on resume the generators are as they were."""
    if fresh:
        torch.manual_seed(recipe.seed + accelerator.process_index)


class _Silent:
    """The log of the processes that do not write."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def __call__(self, event: dict[str, Any]) -> None: ...


# -- files -----------------------------------------------------------------------------------------------------------


def _adapter_files(training: Run, base: Base, folder: Path) -> None:
    """The adapter of this moment, as PEFT reads it."""
    assert training.pool is not None
    head = {}
    if base.head:
        module = base.model.get_submodule(base.head)
        head = {f"{PREFIX}{base.head}.{name}": value for name, value in module.state_dict().items()}
    config = lora_config(
        training.pool.counts,
        base_model=base.reference,
        revision=training.recipe.model.revision,
        task=training.recipe.model.task,
        fan_in_fan_out=_transposed(training.pool),
        modules_to_save=[base.head] if base.head else None,
    )
    write_adapter(folder, config, {**lora_tensors(training.pool), **head})


def _transposed(pool: Pool) -> bool:
    return any(type(layer.base).__name__ == "Conv1D" for layer in pool.layers.values())


def _checkpoint(training: Run, *, folder: Path, base: Base) -> None:
    """Write checkpoints/step-N; without `save_steps` only the last and the best are kept."""
    accelerator, progress = training.accelerator, training.progress
    if accelerator.is_main_process:
        path = folder / run_folder.CHECKPOINTS / f"step-{progress.step}"
        with run_folder.whole_folder(path) as temporary:
            if training.pool:
                _adapter_files(training, base, temporary)
            position = {
                "progress": dataclasses.asdict(progress),
                "counts": training.pool.counts if training.pool else {},
                "parameters": training.pool.parameters if training.pool else 0,
            }
            averages = training.control.state_dict() if training.control else {}
            write_state(temporary, training.parameters, training.optimizer, averages, position)
        run_folder.point(folder, "last", progress.step)
        if progress.best and progress.best["step"] == progress.step:
            run_folder.point(folder, "best", progress.step)
        if not training.recipe.train.save_steps:
            named = {run_folder.pointed(folder, "last"), run_folder.pointed(folder, "best")}
            for old in run_folder.step_folders(folder):
                if old not in named:
                    shutil.rmtree(old)
        training.emit({"event": "checkpoint", "step": progress.step, "path": str(path)})
    accelerator.wait_for_everyone()


def _final_files(folder: Path, training: Run, base: Base, tokenizer: PreTrainedTokenizerBase) -> str:
    """The root of the run folder: adapter or model, and tokenizer; says whether it is the last or the best."""
    if not training.accelerator.is_main_process:
        return "last"
    tokenizer.save_pretrained(folder)
    if training.pool is None:
        base.model.save_pretrained(folder)
        return "last"
    best = run_folder.pointed(folder, "best")
    if training.recipe.eval.early_stopping_patience is not None and best is not None:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(best / name, folder / name)
        return "best"
    with run_folder.whole_folder(folder / ".adapter") as temporary:
        _adapter_files(training, base, temporary)
        for path in temporary.iterdir():
            path.replace(folder / path.name)
    (folder / ".adapter").rmdir()
    return "last"


def _finish(folder: Path, record: dict[str, Any], training: Run, base: Base, summary: dict[str, Any]) -> None:
    """Complete dynlora.json, and make the report and the model card from it."""
    if not training.accelerator.is_main_process:
        return
    pool = training.pool
    if pool:
        record["layers"] = {
            name: {
                "rank": layer.count,
                "importance": layer.energy(),
                "d_in": layer.in_features,
                "d_out": layer.out_features,
            }
            for name, layer in pool.layers.items()
        }
    record |= {
        "adapter": summary["adapter"],
        "timings": {"training_seconds": summary["seconds"]},
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "summary": summary,
    }
    run_folder.write_json(folder / run_folder.RECORD, record)
    write_report(folder)
    write_card(folder)


# -- the record ------------------------------------------------------------------------------------------------------


def _record(recipe: Recipe, base: Base, data: Data, accelerator: Accelerator, start: Start | None) -> dict[str, Any]:
    """dynlora.json as far as it is known before training."""
    packages = ("torch", "transformers", "accelerate", "datasets", "bitsandbytes", "safetensors", "tokenizers")
    tokenizer_file = base.folder / "tokenizer.json"
    return {
        "schema_version": SCHEMA_VERSION,
        "dynlora_version": __version__,
        "task": recipe.model.task,
        "variant": recipe.adapter.variant,
        "base_model": {
            "name_or_path": recipe.model.name_or_path,
            "reference": base.reference,
            "revision": recipe.model.revision,
            "fingerprint": fingerprint(base.folder),
        },
        "budget": {"requested": recipe.rank.budget, "parameters": start.budget, "start_parameters": start.parameters}
        if start
        else None,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_yaml": to_yaml(recipe),
        "data": {
            "counts": data.counts,
            "train_rows": len(data.train),
            "val_rows": len(data.val),
            "labels": data.labels,
            "sha256": data.sha256,
        },
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() if tokenizer_file.is_file() else None,
        "chat_template_sha256": hashlib.sha256(str(base.tokenizer.chat_template).encode()).hexdigest()
        if base.tokenizer.chat_template
        else None,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "seeds": {"seed": recipe.seed},
        "device": _device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "dtype": str(base.dtype).removeprefix("torch."),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _start_event(recipe: Recipe, training: Run, base: Base, data: Data, start: Start | None) -> dict[str, Any]:
    pool = training.pool
    example = show_example(data.train[0], base.tokenizer)
    facts = {
        "name": Path(recipe.output_dir).name,
        "output_dir": recipe.output_dir,
        "model": recipe.model.name_or_path,
        "task": recipe.model.task,
        "variant": recipe.adapter.variant,
        "policy": recipe.pruning.policy if training.control and training.control.schedule.steps else None,
        "device": _device_name(training.accelerator.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "steps": training.total_steps,
        "epochs": training.total_steps / training.batches.steps_per_epoch,
        "train_rows": len(data.train),
        "val_rows": len(data.val),
        "trainable_parameters": sum(p.numel() for p in training.parameters),
        "components": pool.components if pool else None,
        "parameters": pool.parameters if pool else None,
        "budget_parameters": start.budget if start else None,
        "scale": next(iter(pool.layers.values())).scale if pool else None,
    }
    layers = [
        {"name": name, "d_in": layer.in_features, "d_out": layer.out_features, "components": start.counts[name]}
        for name, layer in (pool.layers.items() if pool and start else ())
    ]
    return {"event": "start", "run": facts, "layers": layers, "notes": data.notes, "example": example}


def _summary(recipe: Recipe, training: Run, start: Start | None, folder: Path, adapter: str) -> dict[str, Any]:
    """What came out; the same dict is printed, returned with --json and kept in dynlora.json."""
    progress, pool = training.progress, training.pool
    first, last = progress.first or {}, progress.last or {}
    if adapter == "best" and progress.best:
        last = progress.best
    weights = folder / ("adapter_model.safetensors" if pool else "model.safetensors")
    summary: dict[str, Any] = {
        "ok": True,
        "output_dir": recipe.output_dir,
        "model": recipe.model.name_or_path,
        "variant": recipe.adapter.variant,
        "policy": recipe.pruning.policy if training.control and training.control.schedule.steps else None,
        "steps": progress.step,
        "loss_before": first.get("loss"),
        "loss_after": last.get("loss"),
        "parameters": pool.parameters if pool else sum(p.numel() for p in training.parameters),
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "peak_memory_bytes": _peak_memory(training.accelerator.device),
        "adapter": adapter,
        "adapter_bytes": weights.stat().st_size if weights.is_file() else None,
    }
    for name in ("accuracy", "perplexity"):
        if name in last:
            summary |= {f"{name}_before": first.get(name), f"{name}_after": last[name]}
    if pool and start:
        summary |= {
            "parameters_start": start.parameters,
            "budget_parameters": start.budget,
            "components_start": sum(start.counts.values()),
            "components": pool.components,
            "ranks": dict(pool.counts),
            "importance": {name: layer.energy() for name, layer in pool.layers.items()},
        }
    return summary


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
