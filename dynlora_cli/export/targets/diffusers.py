"""A LoRA of a diffusion pipeline, as diffusers loads it: pytorch_lora_weights.safetensors.

What it does
    Writes the file with the names of diffusers, `unet.` or `transformer.` and `text_encoder.` first, at a scale of 1
    for every layer, and the rank and alpha of each layer in its metadata. Files of kohya's come out in this form too.

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
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.images.write import save
from dynlora_cli.config.types import Section
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.pipelines import of_pipeline

needs_base = False
of_pipelines = True
DTYPES = ("fp16", "bf16")


def prepared(adapter: Adapter, options: Section) -> Adapter:  # noqa: ARG001
    """The adapter with the names that it has in the pipeline."""
    found, image = of_pipeline(adapter, "diffusers")
    return replace(found, image=ImageFile("diffusers", IMAGE_STEM, image.dtype, image.metadata))


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the file."""
    file = save(job.adapter, folder, job.dtype)
    return {"file": file.name, "largest_rank": max(job.adapter.ranks.values())}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The file as every command reads it."""
    return read_image(folder / f"{IMAGE_STEM}.safetensors")
