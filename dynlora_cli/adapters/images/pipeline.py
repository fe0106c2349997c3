"""A rank by timestep in a pipeline of diffusers that has loaded the adapter: PEFT's layers use its first components.

Dimensions: B rows of a batch, C components of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.timesteps.clock import Clock, follow, for_rows
from dynlora_cli.lora.timesteps.schedule import Schedule, from_metadata

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder, the first that is there
PARTS = ("transformer", "unet")  # what a pipeline may call its denoiser


@contextmanager
def rank_by_timestep(pipe: Any, adapter: str | Path, name: str | None = None) -> Iterator[None]:
    """Inside the `with` block a T-LoRA uses as many components as the timestep allows, as in training.

        pipe.load_lora_weights("runs/dog")
        with rank_by_timestep(pipe, "runs/dog"):
            picture = pipe("a photo of sks dog").images[0]

    Each pass of the denoiser is at the timestep that it is told, of each row where it is told several, so that any
    sampler, guidance and number of pictures go. Afterwards the pipeline computes with all components again.

    Args:
        pipe: of diffusers, with the adapter loaded by `load_lora_weights`; or the denoiser itself.
        adapter: the run's folder, or the adapter's .safetensors file, which says how many components at which timestep.
        name: of the adapter in the pipeline; None: it is the only one there.

    Raises:
        UsageError: the file holds no rank by timestep, or the pipeline has not loaded this adapter as it is.
    """
    schedule = schedule_in(Path(adapter))
    denoiser = _denoiser_of(pipe)
    clock = Clock(schedule)
    handles = [follow(denoiser, clock)]
    try:
        for a in _factors_in(denoiser, name, schedule):
            handles.append(a.register_forward_hook(partial(_mask, clock)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_trained(denoiser: nn.Module, adapter: Path) -> AbstractContextManager[None]:
    """`rank_by_timestep` where the adapter that a denoiser has loaded says so; else nothing happens."""
    return rank_by_timestep(denoiser, adapter) if _schedule_in(adapter) else nullcontext()


def schedule_in(path: Path) -> Schedule:
    """The schedule of the adapter in a file or folder.

    Raises:
        UsageError: there is none.
    """
    schedule = _schedule_in(path)
    if schedule is None:
        raise UsageError(
            f"{path} holds no rank by timestep: it is a LoRA whose components are always used",
            "call the pipeline as it is",
        )
    return schedule


def _schedule_in(path: Path) -> Schedule | None:
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    try:
        with safe_open(file, "pt") as opened:
            return from_metadata(opened.metadata(), str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is no adapter of a pipeline: {error}", f"name a folder with {FILES[0]}") from None


def _mask(clock: Clock, a: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
    """Forward hook of PEFT's lora_A: the components that a row does not use are 0."""
    channels_first = isinstance(a, nn.Conv2d)
    h = h.movedim(1, -1) if channels_first else h
    open_BC = clock.open_BC(h.shape[-1], h)
    h = h if open_BC is None else h * for_rows(open_BC, h)
    return h.movedim(-1, 1) if channels_first else h


def _denoiser_of(pipe: Any) -> nn.Module:
    if isinstance(pipe, nn.Module):
        return pipe
    found = [getattr(pipe, part) for part in PARTS if isinstance(getattr(pipe, part, None), nn.Module)]
    if not found:
        raise UsageError(f"{type(pipe).__name__} has no {' and no '.join(PARTS)}", "give its denoiser instead")
    return found[0]


def _factors_in(denoiser: nn.Module, name: str | None, schedule: Schedule) -> list[nn.Module]:
    """PEFT's lora_A of every layer that has the adapter.

    Raises:
        UsageError: none has, several adapters are there and none is named, or it is fused into the weights.
    """
    layers: list[Any] = [
        each for each in denoiser.modules() if isinstance(getattr(each, "lora_A", None), nn.ModuleDict)
    ]
    names = list(dict.fromkeys(key for layer in layers for key in layer.lora_A))
    if name is None and len(names) > 1:
        raise UsageError(f"the pipeline holds several adapters: {', '.join(names)}", "say which: name=...")
    if not names or (name is not None and name not in names):
        known = f"it holds {', '.join(names)}" if names else "it holds none"
        raise UsageError(f"the pipeline has not loaded the adapter: {known}", "call pipe.load_lora_weights first")
    key = name or names[0]
    found: list[nn.Module] = [layer.lora_A[key] for layer in layers if key in layer.lora_A]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise UsageError(
            "the adapter is fused into the weights, where nothing goes by the timestep", "call pipe.unfuse_lora first"
        )
    if odd := next((len(a.weight) for a in found if len(a.weight) % schedule.terms), None):  # type: ignore[arg-type]
        raise UsageError(f"a layer has rank {odd}, and components are {schedule.terms} products", "load it as it was")
    return found
