"""What a run leaves behind: checkpoints, the adapter, and dynlora.json with everything that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import Accelerator

from dynlora_cli import __version__, run_folder
from dynlora_cli.adapter import PREFIX, lora_config, lora_tensors, write_adapter
from dynlora_cli.checkpoint import write_state
from dynlora_cli.components import Pool
from dynlora_cli.data import Data, show_example
from dynlora_cli.loop import Run
from dynlora_cli.model import Base, fingerprint
from dynlora_cli.rank import Start
from dynlora_cli.recipe import to_yaml
from dynlora_cli.report import write_card, write_report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.recipe import Recipe

SCHEMA_VERSION = 1


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
