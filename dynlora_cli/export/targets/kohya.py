"""A LoRA of a diffusion pipeline in the form of kohya's scripts, which A1111, Forge and ComfyUI take.

What it does
    Writes NAME.safetensors with the names `lora_unet_...` and `lora_te_...`, one alpha for all layers, and the scale
    of each folded into its factors. For SD 1, 2 and XL, of which alone kohya's files have such names; of XL the
    UNet's names are those of Stability's code, as kohya's scripts write them.

When to use it
    For programs that take LoRA files of "kohya" or "A1111" form.

Reference
    sd-scripts, networks/lora.py; what diffusers makes of the file is checked by it where that is installed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter, ImageFile
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images.by_timestep import plain_at
from dynlora_cli.adapters.images.kohya_names import Style
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.images.write import file_name, save
from dynlora_cli.config.types import Section
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.pipelines import is_xl, of_pipeline

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
    "names": {
        "type": "choice",
        "choices": ["auto", "sgm", "diffusers"],
        "default": "auto",
        "help": "Of the UNet: Stability's (sgm) or diffusers'; auto: Stability's for SD XL, as kohya's scripts do.",
    },
}


def prepared(adapter: Adapter, options: Section) -> Adapter:
    """The adapter as it is named in such a file."""
    found, image = of_pipeline(adapter, "kohya")
    found = plain_at([found], options.model_dump()["at_step"])[0]
    xl = is_xl(found) if image.form != "kohya" else image.style.numbered
    names: str = options.model_dump()["names"]
    kept = image.style.sgm if image.form == "kohya" else xl
    style = Style(sgm=kept if names == "auto" else names == "sgm", numbered=xl)
    stem = adapter.name if image.stem == IMAGE_STEM else image.stem
    return replace(found, image=ImageFile("kohya", stem, image.dtype, image.metadata, style))


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the file."""
    file = save(job.adapter, folder, job.dtype)
    return {"file": file.name, "largest_rank": max(job.adapter.ranks.values())}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The file as every command reads it."""
    return read_image(folder / file_name(job.adapter))
