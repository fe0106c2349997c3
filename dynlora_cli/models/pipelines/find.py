"""A pipeline's folder on this machine, looked at before torch is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli import plugins
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.extras import install
from dynlora_cli.files.foreign import WEIGHT_FILES, IndexForm, fits, inside, read_object, refuse_links
from dynlora_cli.text import show

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model

INDEX = "model_index.json"
BUILTIN = {"builtin:tiny-image": Path(__file__).parents[2] / "assets" / "builtin_tiny_image"}
LOADER = "DiffusionPipeline"  # as AUTO_MODEL of the tasks whose base is a pipeline
# The denoiser of each kind of pipeline that is trained: all others call theirs in another way.
DENOISERS = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
}
LIBRARIES = {"diffusers", "transformers"}


def needs_pipeline(options: Model) -> bool:
    """Whether the task of a recipe's `model` section is one for a pipeline."""
    return bool(plugins.declared("tasks", options.task, "AUTO_MODEL") == LOADER)


def find_pipeline(options: Model) -> tuple[Path, str]:
    """The folder of a pipeline's denoiser, and how an adapter should name the pipeline.

    Raises:
        UsageError: there is no such folder, or it holds no pipeline of a kind that is trained.
        MachineError: diffusers or pillow is not installed.
    """
    name = options.name_or_path
    folder = BUILTIN.get(name) or Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"model.name_or_path: there is no folder {name}",
            "name a pipeline's folder, as diffusers saves it, or builtin:tiny-image; one of the hub: "
            "hf download --local-dir FOLDER NAME",
        )
    index = read_index(folder)
    part = DENOISERS[index["_class_name"]]
    denoiser = folder / part
    if not (denoiser / "config.json").is_file():
        raise UsageError(f"{folder} holds no {part}/config.json, which its {INDEX} names", "copy the files again")
    refuse_links(denoiser, besides=WEIGHT_FILES)
    for listed in denoiser.glob("*.index.json"):
        for file in fits(IndexForm, read_object(listed), listed).files:
            inside(denoiser, file, listed)
    return denoiser.resolve(), str(folder.resolve())


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline is made of.

    Raises:
        UsageError: the folder holds no pipeline, or none of a kind that is trained; a part is made of code of its own.
        MachineError: diffusers or pillow is not installed.
    """
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"model.name_or_path: {folder} holds no {INDEX}, so it is no pipeline of diffusers",
            "name the folder that pipe.save_pretrained wrote; for texts set another model.task",
        )
    index = read_object(folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in DENOISERS:
        raise UsageError(
            f"{folder / INDEX}: a pipeline of the class {show(kind)} is not trained here",
            f"there are: {', '.join(DENOISERS)}",
        )
    for part, named in index.items():
        if not isinstance(named, list) or named in ([None, None], []):
            continue
        if len(named) != 2 or named[0] not in LIBRARIES:
            raise UsageError(
                f"{folder / INDEX}: {part} is {show(named)}, which is not of diffusers or transformers; it was not "
                "loaded",
                "name a pipeline whose parts are of these libraries",
            )
    missing = [
        name
        for name, module in (("diffusers", "diffusers"), ("pillow", "PIL"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise MachineError(f"model.task {'text-to-image'}: not installed: {', '.join(missing)}", install("images"))
    return index
