"""Adapters whose rank goes by the timestep (T-LoRA): read with their schedule, and cut to one timestep.

Dimensions: C components of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dynlora_cli.adapters.adapter import PLAIN, Adapter
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.timesteps.schedule import from_metadata

KIND = "t-lora"


def with_schedule(adapter: Adapter, metadata: Mapping[str, str] | None, file: Path) -> Adapter:
    """The adapter with the schedule that stands in its file's metadata; as it is where none does.

    Raises:
        UsageError: the schedule cannot be carried out, or not on these layers.
    """
    schedule = from_metadata(metadata, str(file))
    if schedule is None:
        return adapter
    for name, factors in adapter.layers.items():
        if factors.kind != PLAIN or factors.embedding or factors.experts:
            raise UsageError(f"{file}: {name} is no plain layer, and the file has a rank by timestep", "copy it again")
        if factors.rank % schedule.terms:
            raise UsageError(
                f"{file}: {name} has rank {factors.rank}, and its components are {schedule.terms} products each",
                "the file was changed by a tool that does not know of it; take it as it was",
            )
    timed = {name: replace(factors, kind=KIND, schedule=schedule) for name, factors in adapter.layers.items()}
    return adapter.with_layers(timed)


def at_step(adapter: Adapter, timestep: float) -> Adapter:
    """The plain LoRA that an adapter is at one timestep; one without a schedule is that already.

    Raises:
        UsageError: there is no such timestep, or nothing is used there.
    """
    schedule = adapter.schedule
    if schedule is None:
        return adapter
    if not 0 <= timestep <= schedule.timesteps:
        raise UsageError(f"there is no timestep {timestep:g}", f"they go from 0 to {schedule.timesteps:g}, all noise")
    cut = {}
    for name, factors in adapter.layers.items():
        used_C = torch.arange(factors.rank) < schedule.rank_at(timestep, factors.rank)
        cut[name] = replace(factors.keep(used_C), kind=PLAIN, schedule=None)
    plain = adapter.with_layers(cut)
    if not plain.layers:
        raise UsageError(f"{adapter.folder} uses no component at timestep {timestep:g}", "choose a smaller one")
    return plain


def plain_at(adapters: Sequence[Adapter], timestep: float | None) -> list[Adapter]:
    """The adapters, each a single update: those whose rank goes by the timestep as they are at this one.

    Raises:
        UsageError: no timestep is given and one of them needs it, or one is given and none does.
    """
    timed = [adapter for adapter in adapters if adapter.schedule]
    if timed and timestep is None:
        raise no_single_weight(timed[0].folder)
    if timestep is not None and not timed:
        raise UsageError(
            f"{adapters[0].folder} uses all its components at every timestep", "leave the timestep (at-step) out"
        )
    return [adapter if timestep is None else at_step(adapter, timestep) for adapter in adapters]


def bands(adapter: Adapter, count: int) -> list[tuple[float, float, Adapter]]:
    """The plain LoRAs of equal parts of the timesteps, each as it is in the middle of its part: begin, end, adapter."""
    assert adapter.schedule is not None
    width = adapter.schedule.timesteps / count
    return [(part * width, (part + 1) * width, at_step(adapter, (part + 0.5) * width)) for part in range(count)]


def no_single_weight(folder: Path | str = "the adapter") -> UsageError:
    """What a command says that needs one update for all timesteps."""
    return UsageError(
        f"{folder} uses other components at other timesteps (T-LoRA), so there is no single update",
        "say at which timestep, from 0 (clean) to 1000 (all noise): `dynlora merge --at-step 300`, or "
        "`dynlora export --to diffusers --set at_step=300`",
    )
