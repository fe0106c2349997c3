"""Metrics of a run: every step for the live view, every `log_steps` a line for the files and the trackers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import psutil
import torch
from torch import Tensor

from dynlora_cli.runs import events
from dynlora_cli.training.run import Run


class Window:
    """What happened since the last line of metrics."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin with the next line."""
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.grad_norm: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])
        self.seconds.append(record["step_seconds"])
        self.tokens.append(record["tokens"])
        self.grad_norm = record["grad_norm"]


def count_step(run: Run, record: dict[str, Any], seconds: float) -> None:
    """Move on by one step and tell the live view."""
    progress = run.progress
    progress.step += 1
    progress.tokens += record["tokens"]
    progress.seconds += seconds
    record["step_seconds"] = seconds
    shown = {key: record[key] for key in ("loss", "learning_rate")}
    run.emit(events.tick(shown, _alive(run), record["tokens"] / seconds))


def _alive(run: Run) -> dict[str, int]:
    return {"step": run.progress.step, **run.trained.alive()}


def log_window(run: Run, window: Window) -> None:
    """One line of metrics, to the files and the trackers."""
    progress = run.progress
    # Medians: the first step of a process is slow, and pruning events are not steps. Speeds compare, since batches are
    # of different lengths; step times alone do not.
    speed = statistics.median(tokens / seconds for tokens, seconds in zip(window.tokens, window.seconds, strict=True))
    progress.tokens_per_second_start = progress.tokens_per_second_start or speed
    progress.tokens_per_second_end = speed
    held = resident_bytes(run)
    progress.held_start, progress.held_end = progress.held_start or held, held
    metrics = {
        "loss": sum(window.losses) / len(window.losses),
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": window.grad_norm,
        **run.objective.take(run.total),
        "tokens": progress.tokens,
        "tokens_per_second": sum(window.tokens) / sum(window.seconds),
        "step_seconds": statistics.median(window.seconds),
        "epoch": run.batches.epochs_after(progress.step),
        "memory_bytes": memory_in_use(run.accelerator.device),
        **held,
        "seconds": progress.seconds,
    }
    run.emit(events.train(_alive(run), metrics))
    numbers = {**_alive(run), **metrics}
    run.track({f"train/{k}": v for k, v in numbers.items() if v is not None}, progress.step)


def memory_in_use(device: torch.device) -> int:
    """Bytes the process holds now: of the GPU where one trains, else resident memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def resident_bytes(run: Run) -> dict[str, int]:
    """Bytes of tensors, each storage once.

    Returns:
        base_bytes: frozen weights and buffers, with the scales of a quantized base.
        trained_bytes: what trains, with its gradient.
        optimizer_bytes: its moments, paged ones wherever they are.
    """
    seen: set[int] = set()
    trained = (tensor for parameter in run.parameters for tensor in (parameter, parameter.grad))
    moments = (value for state in run.optimizer.state.values() for value in state.values())
    states = (getattr(module, "state", None) for module in run.model.modules())  # of 8-bit layers, after a first pass
    model = chain(run.model.parameters(), run.model.buffers(), (state for state in states if hasattr(state, "SCB")))
    # Components are views of what trains, which is counted before the model.
    return {
        "trained_bytes": _count(trained, seen),
        "optimizer_bytes": _count(moments, seen),
        "base_bytes": _count((held for holder in model for held in _with_scales(holder)), seen),
    }


def _with_scales(holder: Any) -> Iterator[Any]:
    """What bitsandbytes keeps at a quantized weight or layer, with the scales of scales; of others the tensor alone."""
    yield holder
    for value in vars(holder).values():
        if hasattr(value, "absmax"):
            yield from _with_scales(value)
        else:
            yield value


def _count(values: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for value in values:
        value = value.to_local() if hasattr(value, "to_local") else value
        if isinstance(value, Tensor) and (storage := value.untyped_storage()).data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
