"""What a run leaves behind: checkpoints, the adapter, and dynlora.json with everything that made it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli import __version__
from dynlora_cli.adapters.find import HYPERNET_WEIGHTS, ROUTER_WEIGHTS, WEIGHTS
from dynlora_cli.adapters.new_tokens import tokens_on_record
from dynlora_cli.config.load import to_yaml
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.mix import each_once, mix_on_record
from dynlora_cli.data.vocabulary import sha256_of_text, tokenizer_sha256
from dynlora_cli.files.whole import remove, whole_folder
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.hypernets.reconstructing import Reconstructing
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.routers.trained import Routed
from dynlora_cli.lora.timesteps.layer import schedule_of
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.load import sees
from dynlora_cli.runs import events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs import record as records
from dynlora_cli.runs.record import Record
from dynlora_cli.runs.report.write import write_card, write_report
from dynlora_cli.text import MEASURES, counted
from dynlora_cli.training.checkpoint import write_state
from dynlora_cli.training.roots import write_adapter_of
from dynlora_cli.training.routers import library_on_record
from dynlora_cli.training.run import Progress, Run

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model
    from dynlora_cli.lora.start import Start
    from dynlora_cli.models.load import Base


FOR_PEOPLE = ("report.html", "README.md")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "bitsandbytes", "safetensors", "tokenizers")


def write_checkpoint(training: Run, folder: Path, run: str | None) -> None:
    """Write checkpoints/step-N, and let the file `last` name it; `best` too, where it is the best.

    Without `train.save_steps` only those two are kept, and the one before the last, should that be damaged.

    Args:
        training: the run.
        folder: of it.
        run: its identity.

    Raises:
        DynloraError: the folder has gone.
    """
    progress = training.progress
    if training.accelerator.is_main_process:
        run_folder.refuse_gone(folder)
        path = folder / run_folder.CHECKPOINTS / f"step-{progress.step}"
        with whole_folder(path) as temporary:
            if isinstance(training.trained, Pool):
                write_adapter_of(training, training.trained, temporary)
            position = {
                "run": run,
                "progress": dataclasses.asdict(progress),
                "counts": training.trained.counts,
                "born": {name: list(layer.born) for name, layer in training.trained.layers.items()},
                "parameters": training.trained.parameters,
                "scaler": training.accelerator.scaler.state_dict() if training.accelerator.scaler else None,
            }
            if training.stream:
                position["stream"] = training.stream.place(progress.step)
            averages = training.control.state_dict() | training.objective.state_dict()
            write_state(temporary, training.parameters, training.optimizer, averages, position)
        run_folder.point(folder, "last", progress.step)
        if progress.best and progress.best["step"] == progress.step:
            run_folder.point(folder, "best", progress.step)
        if not training.recipe.train.save_steps:
            for old in run_folder.step_folders(folder)[:-2]:
                if old != run_folder.pointed(folder, "best"):
                    remove(old)
        training.emit(events.checkpoint(progress.step, path))


def finish(folder: Path, record: Record, training: Run, summary: dict[str, Any]) -> None:
    """Complete dynlora.json, and make the report and the model card from it."""
    layers = training.trained.layers
    end = Record(
        scale=next(iter(layers.values())).scale if layers else None,
        layers={
            name: records.Layer(
                rank=layer.count,
                importance=layer.energy(),
                d_in=layer.in_features,
                d_out=layer.out_features,
                born=list(layer.born),
            )
            for name, layer in layers.items()
        },
        adapter=summary["adapter"],
        timings={"training_seconds": summary["seconds"], "rate_seconds": summary["rate_seconds"]},
        peak_memory_bytes=summary["peak_memory_bytes"],
        finished=records.now(),
        summary=summary,
    )
    record.update(end)
    if training.stream:  # which has read more by now
        record["data"] = _data_on_record(training)
    if training.accelerator.is_main_process:
        run_folder.refuse_gone(folder)
        for name in FOR_PEOPLE:
            (folder / name).unlink(missing_ok=True)  # of an earlier end of this run: what is there is of this one
        write_record(folder, record, training)
        write_pages(folder)


def write_pages(folder: Path) -> bool:
    """Make the report and the model card of a finished run, where one of them is missing; say whether one was."""
    missing = not all((folder / name).is_file() for name in FOR_PEOPLE)
    if missing:
        write_report(folder)
        write_card(folder)
    return missing


def write_record(folder: Path, record: Record, training: Run) -> None:
    """Write dynlora.json, from one process."""
    if training.accelerator.is_main_process:
        records.write(folder, record)


def identity(before: Mapping[str, Any] | None) -> str | None:
    """The name that ties checkpoints to their run, a new one or that of the run that goes on; 0.1 gave none."""
    return uuid.uuid4().hex if before is None else before.get("run_id")


def start_record(training: Run, run: str | None) -> Record:
    """dynlora.json as far as it is known before training; `run` is the run's identity."""
    recipe, base = training.recipe, training.base
    template, schedule = base.tokenizer.chat_template, training.control.schedule
    started = records.now()
    altered = training.start.altered_births if training.start else 0
    record = Record(
        schema_version=records.SCHEMA_VERSION,
        dynlora_version=__version__,
        run_id=run,
        name=Path(recipe.output_dir).name,
        task=recipe.model.task,
        variant=recipe.adapter.variant,
        base_model=_base_on_record(recipe.model, base),
        births=[*(training.start.births if training.start else ()), _birth(training, run, started)] if run else [],
        budget=_budget_on_record(training, training.start) if training.start else None,
        history=list(zip(schedule.steps, schedule.targets, strict=True)),
        recipe=recipe.model_dump(mode="json"),
        recipe_yaml=to_yaml(recipe),
        data=_data_on_record(training),
        tokenizer_sha256=tokenizer_sha256(base.tokenizer),
        chat_template_sha256=sha256_of_text(str(template)) if template else None,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        seeds={"seed": recipe.seed},
        device=_device_name(training.accelerator.device),
        processes=training.accelerator.num_processes,
        dtype=str(base.dtype).removeprefix("torch."),
        started=started,
    )
    if altered:
        record["altered_births"] = altered
    if isinstance(training.trained, Pool) and (timed := schedule_of(training.trained)):
        record["rank_by_timestep"] = timed.as_dict()
    if base.rows:
        record["tokens"] = tokens_on_record(base)
    if isinstance(training.trained, (Routed, Reconstructing)):
        record["library"] = library_on_record(training.trained.members)
    return record


def _base_on_record(options: Model, base: Base) -> records.BaseModel:
    return records.BaseModel(
        name_or_path=options.name_or_path,
        reference=base.files.reference,
        revision=options.revision,
        model_type=base.model.config.model_type,
        auto_class="AutoModelForImageTextToText" if sees(base.model.config) else None,
        fingerprint=fingerprint(base.folder, base.files.config),
        quantization=base.files.quantization,
    )


def _birth(training: Run, run: str, started: str) -> records.Birth:
    """This run, as the last one of its lineage."""
    folder = Path(training.recipe.output_dir).resolve()
    before = training.start.births if training.start else ()
    birth = records.Birth(
        run=run,
        name=folder.name,
        date=started,
        data_sha256=training.data.sha256,
        folder=str(folder),
        old=training.recipe.adapter.old if training.recipe.adapter.origin else None,
    )
    if any(each["old"] is None for each in before[1:]):  # of adapters that were merged
        birth["runs_before"] = len(before)
    return birth


def _budget_on_record(training: Run, start: Start) -> records.Budget:
    asked = training.recipe.rank.parsed_budget()
    return records.Budget(
        **({"bytes": int(asked.value)} if asked.kind == "bytes" else {}),
        requested=training.recipe.rank.budget,
        parameters=start.limit,
        start_parameters=start.parameters,
        start_components=start.counts,
        start_born={name: list(start.born.get(name) or (count,)) for name, count in start.counts.items()},
    )


def _data_on_record(training: Run) -> records.Data:
    data = training.data
    found = records.Data(
        counts=data.counts,
        train_rows=data.counts["train"]["rows"] if training.stream else len(data.train),
        val_rows=len(data.val),
        sha256=data.sha256,
        date=data.writing.date,
        turned=dict(data.writing.turned),
        template_kwargs=dict(data.writing.template_kwargs),
        system=data.writing.system,
        reasoning=data.writing.reasoning,
        labels=data.labels,
        retrieval=data.retrieval,
    )
    if data.replay:
        found["replay"] = data.replay
    if data.prior:
        found["prior"] = data.prior
    found.update(_rows_of(training))
    return found


def _rows_of(training: Run) -> records.Data:
    """Which rows came up, where that is not each of them once an epoch."""
    if training.stream:
        return records.Data(stream=training.stream.on_record())
    spans = training.data.spans
    return records.Data() if each_once(spans) else records.Data(mix=mix_on_record(spans))


def start_event(training: Run) -> dict[str, Any]:
    """What is about to be trained, for the console."""
    recipe, base, data, start = training.recipe, training.base, training.data, training.start
    trained = training.trained
    facts: dict[str, Any] = {
        "name": Path(recipe.output_dir).name,
        "output_dir": recipe.output_dir,
        "model": recipe.model.name_or_path,
        "task": recipe.model.task,
        "variant": recipe.adapter.variant,
        "policy": recipe.pruning.policy if training.control.schedule.steps else None,
        "device": _device_name(training.accelerator.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "steps": training.total_steps,
        "epochs": None if training.stream else training.batches.epochs_after(training.total_steps),
        "train_rows": len(data.train),
        "val_rows": len(data.val),
        "objective": training.task.objective,
        "supervised_tokens": None if data.labels or data.kind.one_target else data.counts["train"]["supervised"],
        "trainable_parameters": sum(parameter.numel() for parameter in training.parameters),
        "components": trained.components or None,
        "parameters": trained.parameters or None,
        "budget_parameters": start.limit if start else None,
        "scale": next(iter(trained.layers.values())).scale if trained.layers else None,
        "held_out": [result for result in (training.progress.first, training.progress.last) if result],
    }
    facts |= {"stream": training.stream.on_record()} if training.stream else {}
    layers = [
        {"name": name, "d_in": layer.in_features, "d_out": layer.out_features, "components": layer.count}
        for name, layer in trained.layers.items()
    ]
    example = show_example(data.train[0], base.tokenizer, data.labels)
    return events.start(facts, layers, data.notes, example)


def summarize(training: Run, folder: Path, kind: str, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """What came out; the same dict is printed, returned with --json and kept in dynlora.json.

    Args:
        training: the run, at its end.
        folder: of it.
        kind: "last" or "best", whichever the root of the run folder holds.
        saved: what its components are worth as they were saved, where they were rounded for it.
    """
    recipe, progress, trained, start = training.recipe, training.progress, training.trained, training.start
    first = progress.first or {}
    last = saved or (progress.best if kind == "best" else progress.last) or {}
    holds_factors = "adapter_model.safetensors" if trained.layers else "model.safetensors"
    if isinstance(trained, Routed):
        holds_factors = ROUTER_WEIGHTS if (folder / ROUTER_WEIGHTS).is_file() else WEIGHTS
    elif isinstance(trained, Generated):
        holds_factors = HYPERNET_WEIGHTS
    weights = folder / holds_factors
    summary: dict[str, Any] = {
        "ok": True,
        "output_dir": recipe.output_dir,
        "model": recipe.model.name_or_path,
        "variant": recipe.adapter.variant,
        "policy": recipe.pruning.policy if training.control.schedule.steps else None,
        "steps": progress.step,
        **_rate(progress),
        "loss_before": first.get("loss"),
        "loss_after": last.get("loss"),
    }
    for name in (measure.key for measure in MEASURES if measure.key != "loss"):
        if name in last:
            summary |= {f"{name}_before": first.get(name), f"{name}_after": last[name]}
    summary |= {key: last[key] for key in ("save_dtype", "rounding", "loss_float32") if key in last}
    summary["parameters"] = trained.parameters or sum(parameter.numel() for parameter in training.parameters)
    if start:
        asked = recipe.rank.parsed_budget()
        summary |= {
            "parameters_start": start.parameters,
            "budget_parameters": start.limit,
            **({"budget_bytes": int(asked.value)} if asked.kind == "bytes" else {}),
            "average_rank": start.rank_of(trained.parameters),
            "components_start": sum(start.counts.values()),
            "components": trained.components,
            "ranks": dict(trained.counts),
            "importance": {name: layer.energy() for name, layer in trained.layers.items()},
        }
    return summary | {
        **_rows_of(training),
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / (progress.seconds - progress.rate_seconds),
        "tokens_per_second_start": progress.tokens_per_second_start,
        "tokens_per_second_end": progress.tokens_per_second_end,
        "peak_memory_bytes": _peak_memory(training.accelerator.device),
        **(progress.held_end or {}),
        **{f"{key}_start": value for key, value in (progress.held_start or {}).items() if key != "base_bytes"},
        "adapter": kind,
        "adapter_bytes": weights.stat().st_size if weights.is_file() else None,
    }


def _rate(progress: Progress) -> dict[str, Any]:
    return {
        "learning_rate": progress.learning_rate,
        "learning_rate_from": progress.rate_from,
        "rates_tried": progress.rates_tried,
        "rate_seconds": progress.rate_seconds,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where one trains, else the process's resident memory at its highest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where training runs on a GPU

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
