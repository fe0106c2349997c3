"""Which folder a person means by `--adapter D`; found without torch, so that a wrong path is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.adapters.images.names import looks_like_image
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.place import is_workplace
from dynlora_cli.files.tensor_file import header_of
from dynlora_cli.runs import sweep
from dynlora_cli.runs.folder import CHECKPOINTS, RECORD, STATE, fault_of, pointed, step_folders
from dynlora_cli.text import to_type

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PACKED, PACKED_WEIGHTS = "adapter_packed.json", "adapter_packed.safetensors"  # see adapters/packed/archive.py
ROUTER = "router.json"  # of a trained router over adapters, see adapters/routed.py
ROUTER_WEIGHTS = "router.safetensors"
HYPERNET = "hypernet.json"  # of a network that writes adapters, see hypernets/files.py
HYPERNET_WEIGHTS = "hypernet.safetensors"
IMAGE_STEM = "pytorch_lora_weights"  # as diffusers calls the file of a LoRA, see adapters/images/
IMAGE_WEIGHTS = f"{IMAGE_STEM}.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ORIGIN = "adapter.from"  # the key of a recipe that names an adapter to go on from


def find_adapter(path: Path, said: str = "--adapter") -> tuple[Path, str | None]:
    """The adapter folder that `path` names, and a sentence about it where it was looked for.

    Of an adapter for a diffusion pipeline it is the file, which a person may name themselves.

    A run's own adapter comes first, then its best and its last checkpoint; a folder that holds no run means the newest
    one below it, that of a sweep its best.

    Args:
        path: as a person names it.
        said: the option or key that it was named in.

    Raises:
        UsageError: there is none, or several side by side of which none is newer in any sense.
    """
    if not path.is_dir():
        return _file(path, said), None
    if found := _in_folder(path):
        others = _side_by_side(path)
        if found[1] is None and others and not (path / RECORD).is_file():
            return path, f"adapter: {path} itself; below it there are others: {_names(others)}"
        return found
    if len(others := _side_by_side(path)) > 1 and not any(path.rglob(RECORD)):
        raise UsageError(
            f"{path} holds several adapters side by side: {_names(others)}", f"name one: {said} {others[0]}"
        )
    names = (RECORD, CONFIG, ROUTER, PACKED, HYPERNET, IMAGE_WEIGHTS)
    files = [file for name in names for file in path.rglob(name) if not _is_part(file.parent)]
    records = [file for file in files if not any(map(is_workplace, file.relative_to(path).parents))]
    if (best := _best_of_sweep(path)) and (found := _in_folder(best)):
        return found[0], f"adapter: {found[0]}, the best of the sweep in {path}"
    for file in sorted(records, key=lambda file: (file.name == RECORD, file.stat().st_mtime), reverse=True):
        if found := _in_folder(file.parent):
            return found[0], f"adapter: {found[0]}, the newest below {path}"
    if (pickled := path / f"{IMAGE_STEM}.bin").is_file():
        _file(pickled, said)
    if (path / "config.json").is_file() or list(path.glob("*.safetensors")):
        raise UsageError(f"{path} holds a model, not an adapter", "name the folder with adapter_config.json in it")
    raise UsageError(f"{path} holds no adapter ({CONFIG} is missing)", "name a run folder, or train one first")


def _file(path: Path, said: str) -> Path:
    """A file that a person names: one of an adapter for a diffusion pipeline.

    Raises:
        UsageError: it is none, or there is no such file.
    """
    if not path.exists():
        raise UsageError(
            f"{said} {path} does not exist",
            "name a run folder, any folder with adapter_config.json, or the .safetensors of an image pipeline's LoRA",
        )
    if path.suffix.lower() in PICKLES:
        raise UsageError(
            f"{said} {path} is a pickle, which can run any code when it is opened; it was not",
            "if you trust its source, load it with the tool that made it and save it as .safetensors",
        )
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        raise UsageError(
            f"{said} {path} is a file", "name a run folder, any folder with adapter_config.json, or a .safetensors"
        )
    if not looks_like_image(list(header_of(path))) and (path.parent / CONFIG).is_file():
        raise UsageError(f"{said} {path} is a part of an adapter", f"name its folder: {said} {path.parent}")
    return path


def is_image(path: Path) -> bool:
    """Whether what `find_adapter` found is a file, of an adapter for a diffusion pipeline."""
    return path.is_file()


def is_for_pipeline(found: Path) -> bool:
    """Whether what `find_adapter` found is for a diffusion pipeline: a file, or a run that learned on one."""
    return is_image(found) or (found / IMAGE_WEIGHTS).is_file()


def refuse_image(path: Path) -> None:
    """Refuse a file of an adapter for a diffusion pipeline, where the weights of a language model are needed.

    Raises:
        UsageError: it is one.
    """
    if is_image(path):
        raise UsageError(
            f"{path} is an adapter for a diffusion pipeline, which this does not take",
            "inspect, prune (--policy magnitude), merge and export take it; pictures are made with diffusers",
        )


def _images(folder: Path) -> list[Path]:
    """The files of adapters for diffusion pipelines in a folder: diffusers' own, or all others; two at most."""
    if (own := folder / IMAGE_WEIGHTS).is_file():
        return [own]
    found: list[Path] = []
    damaged: UsageError | None = None
    for file in sorted(folder.glob("*.safetensors")):
        try:
            if len(found) < 2 and file.is_file() and looks_like_image(list(header_of(file))):
                found.append(file)
        except UsageError as error:
            damaged = damaged or error
    if damaged and not found:
        raise damaged
    return found


def _best_of_sweep(path: Path) -> Path | None:
    """The run of a sweep's folder that the sweep calls the best: the newest is only the last one that was trained."""
    if not sweep.is_ours(path):
        return None
    best = read_object(path / sweep.RECORD).get("best")
    return next((folder for folder in path.iterdir() if folder.name == best and (folder / RECORD).is_file()), None)


def find_origin(path: Path, out: Path) -> Path:
    """The adapter folder that `adapter.from` names, where a run into `out` can go on from it, as far as JSON tells.

    Args:
        path: as in the recipe.
        out: the run's output folder.

    Raises:
        UsageError: there is none, it lies in the folder that the run would replace, or it is no sum of components.
    """
    folder, _ = find_adapter(path, ORIGIN)
    refuse_image(folder)
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(
            f"{ORIGIN}: {folder} lies in the output folder {out}, which the new run would replace",
            "name another folder in output_dir: both versions stay, and a later one can leave either of them out",
        )
    refuse_hypernet(folder)
    config = {} if (folder / ROUTER).is_file() else config_in(folder)
    kind = str(config.get("peft_type")).upper()
    if not config or kind == "XLORA":
        text = "a router over adapters, which is no sum of components"
        raise UsageError(f"{ORIGIN}: {folder} is {text}", f"go on from one of them: {folder / 'adapters'}/NAME")
    if config.get("use_dora") or kind == "HIRA":
        name = "DoRA" if config.get("use_dora") else "HiRA"
        raise UsageError(
            f"{ORIGIN}: {folder} is a {name}, whose components do not add up to its update", merge_first(folder)
        )
    return folder


def is_hypernet(folder: Path) -> bool:
    """Whether a folder holds a network that writes adapters, see hypernets/files.py."""
    return (folder / HYPERNET).is_file()


def refuse_hypernet(folder: Path) -> None:
    """Refuse a folder that holds a network which writes adapters, and no adapter.

    Raises:
        UsageError: it does.
    """
    if is_hypernet(folder):
        method = read_object(folder / HYPERNET).get("method")
        reads = plugins.declared("hypernets", method, "READS") if method in plugins.names("hypernets") else None
        source = ("--document", "FILE") if reads == "document" else ("--description", "TEXT")
        raise UsageError(
            f"{folder} holds a network that writes adapters, not an adapter",
            f"write one with it, and use that: {to_type('adapt', '--hypernet', folder, *source, '--out', 'FOLDER')}",
        )


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed adapter, and not one as PEFT has it as well."""
    return (folder / PACKED).is_file() and not (folder / CONFIG).is_file()


def config_in(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder; of a packed one that of what it unpacks to.

    Raises:
        UsageError: it cannot be read.
    """
    if not is_packed(folder):
        return read_object(folder / CONFIG)
    config = read_object(folder / PACKED).get("adapter_config")
    return config if isinstance(config, dict) else {}


def merge_first(folder: Path) -> str:
    """What to do with an adapter that a run cannot go on from."""
    return (
        f"merge it into the base first, and train on that: {to_type('merge', '--adapter', folder, '--out', 'FOLDER')}"
    )


def _side_by_side(path: Path) -> list[Path]:
    """Adapters right below a folder that other tools put there: PEFT saves those of one model so, by their names.

    Not the checkpoints of a trainer, nor runs of our own: of these the newest is meant.
    """
    folders = (file.parent for file in sorted(path.glob(f"*/{CONFIG}")))
    left_out = ("checkpoint", ".")  # a trainer's, and what is being written
    return [each for each in folders if not each.name.startswith(left_out) and not (each / RECORD).is_file()]


def _names(folders: list[Path]) -> str:
    more = f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    return ", ".join(folder.name for folder in folders[:4]) + more


def _is_part(folder: Path) -> bool:
    """Whether this is a checkpoint of a run, or one of the adapters of a router: the folder above speaks for both."""
    above = folder.parent.parent
    routed = folder.parent.name == "adapters" and ((above / ROUTER).is_file() or (above / CONFIG).is_file())
    return routed or _is_checkpoint(folder)


def _is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint of a run, which the run's folder speaks for."""
    return folder.parent.name == CHECKPOINTS and folder.name.startswith("step-")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint of a run; None also of one that was kept as an adapter, without its state."""
    return fault_of(folder) if _is_checkpoint(folder) and (folder / STATE).is_file() else None


def _in_folder(folder: Path) -> tuple[Path, str | None] | None:
    if any((folder / name).is_file() for name in (CONFIG, ROUTER, PACKED, HYPERNET)):
        both = (folder / PACKED).is_file() and (folder / CONFIG).is_file()
        return folder, f"adapter: {CONFIG} in {folder}; {PACKED} beside it is not read" if both else None
    named = [(name, pointed(folder, name)) for name in ("best", "last")]
    named += [("newest whole", checkpoint) for checkpoint in reversed(step_folders(folder))]
    for name, checkpoint in named:
        if checkpoint is not None and (checkpoint / CONFIG).is_file() and not damage(checkpoint):
            return checkpoint, f"adapter: {checkpoint}, the {name} checkpoint; the run in {folder} is not finished"
    if len(images := _images(folder)) > 1:
        raise UsageError(
            f"{folder} holds several adapters side by side, such as {images[0].name} and {images[1].name}",
            f"name one of the files: {images[0]}",
        )
    return (images[0], f"adapter: {images[0]}") if images else None
