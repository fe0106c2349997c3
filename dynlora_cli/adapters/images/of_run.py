"""The adapter of a text-to-image run, which PEFT's files name by the denoiser alone, as one of its pipeline."""

from __future__ import annotations

from dataclasses import replace

from dynlora_cli.adapters.adapter import IMAGE_TASK, Adapter, ImageFile
from dynlora_cli.adapters.find import IMAGE_STEM, IMAGE_WEIGHTS
from dynlora_cli.adapters.images.names import DENOISERS
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.files.tensor_file import header_of
from dynlora_cli.runs.folder import CHECKPOINTS, run_of


def as_image(adapter: Adapter) -> Adapter | None:
    """The same adapter with the names that its layers have in the pipeline.

    A run leaves a file of diffusers' form beside PEFT's, which says what the denoiser is called in its pipeline.

    Returns:
        None: it is of no such run.
    """
    if adapter.image:
        return adapter
    if adapter.task != IMAGE_TASK:
        return None
    folder = adapter.folder
    file = (run_of(folder) if folder.resolve().parent.name == CHECKPOINTS else folder) / IMAGE_WEIGHTS
    parts = {key.partition(".")[0] for key in header_of(file) if key != "__metadata__"} if file.is_file() else set()
    if len(parts) != 1 or not parts <= set(DENOISERS):
        return None
    part = parts.pop()
    layers = {f"{part}.{name}": factors for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers, image=ImageFile("diffusers", IMAGE_STEM, FULL))
