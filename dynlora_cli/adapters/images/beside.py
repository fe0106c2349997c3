"""The file by which a pipeline of diffusers loads an adapter that was trained here, beside PEFT's files of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dynlora_cli.adapters.adapter import PLAIN, Adapter, ImageFile
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images.by_timestep import KIND
from dynlora_cli.adapters.images.names import PARTS
from dynlora_cli.adapters.images.write import save
from dynlora_cli.config.dtypes import FULL, OF_IMAGES


def write_beside(adapter: Adapter, folder: Path, part: str, dtype: str) -> None:
    """Write the adapter of a denoiser as its pipeline takes it, where it has a form that a pipeline knows.

    Args:
        adapter: with names as they are in the denoiser.
        folder: where PEFT's files of it are.
        part: what the pipeline calls the denoiser, which is the type of its model; of other models nothing is written.
        dtype: of the factors, which have been rounded to it; in fp32 where such a file has no number like it.

    Raises:
        MeasureError, UsageError: as of `save`.
    """
    if part not in PARTS or adapter.image or {factors.kind for factors in adapter.layers.values()} - {PLAIN, KIND}:
        return
    dtype = dtype if dtype in OF_IMAGES else FULL
    named = {f"{part}.{name}": factors for name, factors in adapter.layers.items()}
    save(replace(adapter, layers=named, image=ImageFile("diffusers", IMAGE_STEM, dtype)), folder, dtype)
