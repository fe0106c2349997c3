"""A LoRA of a diffusion pipeline, as diffusers loads it: pytorch_lora_weights.safetensors.

What it does
    Writes the file with the names of diffusers, `unet.` or `transformer.` and `text_encoder.` first, at a scale of 1
    for every layer, and the rank and alpha of each layer in its metadata. Files of kohya's come out in this form too.
    A T-LoRA keeps the rule of its timesteps in the metadata; `at_step` and `bands` make plain LoRAs of it.

When to use it
    For `pipe.load_lora_weights(FOLDER)`, and everything that is built on diffusers.

Reference
    diffusers' loaders; what they make of the file is checked by diffusers itself where that is installed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter, ImageFile
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images.by_timestep import bands, plain_at
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.images.write import save
from dynlora_cli.config.types import Section
from dynlora_cli.errors import UsageError
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.pipelines import of_pipeline

needs_base = False
of_pipelines = True
DTYPES = ("fp16", "bf16")
OPTIONS = {
    "at_step": {
        "type": "float",
        "default": None,
        "at_least": 0,
        "help": "Of a T-LoRA: as it is at this timestep, where 0 is a clean picture and 1000 all noise.",
    },
    "bands": {
        "type": "int",
        "default": None,
        "at_least": 2,
        "at_most": 100,
        "help": "Of a T-LoRA: also a plain LoRA for each of so many equal parts of the timesteps.",
    },
}


def prepared(adapter: Adapter, options: Section) -> Adapter:
    """The adapter with the names that it has in the pipeline, and as it is at one timestep where that is asked for.

    Raises:
        UsageError: as of `of_pipeline`, or parts of the timesteps are asked for that make no sense.
    """
    found, image = of_pipeline(adapter, "diffusers")
    asked = options.model_dump()
    if asked["at_step"] is not None:
        found = plain_at([found], asked["at_step"])[0]
    if asked["bands"] and not found.schedule:
        what = "is at one timestep then" if asked["at_step"] is not None else "uses all components at every timestep"
        raise UsageError(f"--set bands={asked['bands']}: {adapter.folder} {what}", "leave bands out")
    return replace(found, image=ImageFile("diffusers", IMAGE_STEM, image.dtype, image.metadata))


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the file, and one for each part of the timesteps where that is asked for."""
    parts = []
    count = job.options.model_dump()["bands"]
    for number, (begin, end, part) in enumerate(bands(job.adapter, count) if count else ()):
        file = save(part, folder, job.dtype).rename(folder / f"band-{number}.safetensors")
        parts.append({"file": file.name, "from": begin, "to": end, "parameters": part.parameters})
    if job.adapter.schedule:
        job.notes.append(f"{IMAGE_STEM}.safetensors goes by the timestep: draw with dynlora's api.rank_by_timestep")
    file = save(job.adapter, folder, job.dtype)
    facts = {"file": file.name, "largest_rank": max(job.adapter.ranks.values())}
    return facts | ({"bands": parts} if parts else {})


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The file as every command reads it."""
    return read_image(folder / f"{IMAGE_STEM}.safetensors")
