"""A pipeline's folder as files: which of them hold the weights of a part, and which are copied as they are.

Of any class, unlike in find.py: nothing of a pipeline is loaded here, so only its index and its files must be in order.
No torch, so that a wrong path is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, IndexForm, fits, inside, read_object, refuse_links
from dynlora_cli.files.tensor_file import header_of
from dynlora_cli.models.pipelines.find import BUILTIN, INDEX
from dynlora_cli.text import show

TENSORS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Weights as diffusers and transformers look for them, with a variant such as `fp16` or without, and one shard of them.
WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(\.[\w-]+)?(-\d+-of-\d+)?(\.[\w-]+)?\.safetensors")
SHARD = re.compile(r"-\d+-of-\d+")
WEIGHT_INDEX = "*.safetensors.index*.json"  # a variant's name stands before the ending
# What stands beside weights and is of use to whoever runs the pipeline; pictures and other tools' weights do not.
KEPT = (".json", ".txt", ".md", ".jinja", ".model", ".py")
PLAIN_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
LOAD_SINGLE = "diffusers makes a folder of it: `StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)`"
HAS_TO_BE = "name a pipeline's folder, as diffusers saves it (unet or transformer, vae, scheduler and so on in it)"


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on disk.

    Attributes:
        folder: of model_index.json.
        parts: folders in it that the index names, in its order.
    """

    folder: Path
    parts: tuple[str, ...]

    def weights_of(self, part: str) -> list[list[Path]]:
        """The files of a part's weights: those of one variant together, in order.

        Raises:
            UsageError: the pipeline has no such part, or none in safetensors.
            MachineError: a shard is missing.
        """
        if part not in self.parts:
            raise UsageError(
                f"the adapter adapts {part}, and the pipeline in {self.folder} has no such part: it has "
                f"{', '.join(self.parts)}",
                "this is another pipeline's adapter; name the right one with --base FOLDER",
            )
        folder = self.folder / part
        found = [_shards(folder, index) for index in sorted(folder.glob(WEIGHT_INDEX))]
        sharded = {file for files in found for file in files}
        for file in sorted(folder.glob(f"*{TENSORS}")):
            if file in sharded or not WEIGHTS.fullmatch(file.name):
                continue
            if SHARD.search(file.name):
                raise UsageError(f"{file} is one file of several, and no index names it", COPY_AGAIN)
            found.append([file])
        if not found:
            raise _without_weights(folder)
        return found

    def copied(self, adapted: Collection[str]) -> list[Path]:
        """Files that go into another folder as they are, relative to the pipeline's.

        Args:
            adapted: parts whose weights are written anew. Of such a part whatever else holds weights is left out: it
                would be what the part was before.

        Raises:
            UsageError: a link that leads out of the folder, which could be anything of this machine.
        """
        found = _kept(self.folder)
        for part in self.parts:
            below = self.folder / part
            found += _kept(below) if part in adapted else list(_all(below))
        for file in found:
            if file.is_symlink() and file.suffix == TENSORS:
                header_of(file)
        return [file.relative_to(self.folder) for file in found]

    def left_out(self, adapted: Mapping[str, Collection[Path]]) -> list[str]:
        """Files and folders that are neither copied nor written anew, without hidden ones.

        Args:
            adapted: parts whose weights are written anew, and the files that hold these.
        """
        there = [path for path in self.folder.iterdir() if path.name not in self.parts]
        there += [path for part in adapted for path in (self.folder / part).iterdir()]
        written = {self.folder / name for name in self.copied(adapted)}
        written |= {file for files in adapted.values() for file in files}
        names = [str(path.relative_to(self.folder)) for path in there if path not in written]
        return sorted(name for name in names if not Path(name).name.startswith("."))


def open_pipeline(name: str, said: str = "--base") -> PipelineFolder:
    """The pipeline in a folder, or a built-in one.

    Args:
        name: as a person gives it.
        said: the option that it was given by.

    Raises:
        UsageError: it is none, or its index names something else than folders in it.
    """
    folder = BUILTIN.get(name) or Path(name).expanduser()
    if folder.is_file() and folder.suffix.lower() in (TENSORS, *PICKLES):
        raise UsageError(f"{said} {name} is a whole pipeline in one file, which is not taken", LOAD_SINGLE)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        hint = "; one of the hub: hf download --local-dir FOLDER NAME"
        raise UsageError(f"{said} {name} {what}", HAS_TO_BE + hint)
    if not (folder / INDEX).is_file():
        raise _no_pipeline(folder, f"{said} {name}")
    refuse_links(folder, besides=(TENSORS, *PICKLES))
    parts = tuple(_parts(read_object(folder / INDEX), folder / INDEX))
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UsageError(f"{said} {name} lacks the folder {missing[0]}, which its {INDEX} names", COPY_AGAIN)
    for part in parts:
        refuse_links(folder / part, besides=(TENSORS, *PICKLES))
    return PipelineFolder(folder.resolve(), parts)


def _parts(index: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The parts that an index names: those with a library and a class."""
    for part, named in index.items():
        if part.startswith("_") or not isinstance(named, list) or named in ([], [None, None]):
            continue
        if not PLAIN_NAME.fullmatch(part):
            raise UsageError(f"{path} names the part {show(part)}, which is no name of a folder", COPY_AGAIN)
        yield part


def _no_pipeline(folder: Path, said: str) -> UsageError:
    """What is said of a folder without an index."""
    problem = f"{said} holds no {INDEX}, so it is no pipeline of diffusers"
    single = [file for file in sorted(folder.iterdir()) if file.suffix in (TENSORS, ".ckpt")]
    if (folder.resolve().parent / INDEX).is_file():
        return UsageError(problem, f"name the folder of all its parts: {folder.resolve().parent}")
    if (folder / "config.json").is_file():
        kind = "one model" if "_class_name" in read_object(folder / "config.json") else "a language model"
        return UsageError(f"{problem}; it seems to be {kind}", HAS_TO_BE)
    if single:
        return UsageError(f"{problem}; it holds {single[0].name}", LOAD_SINGLE)
    return UsageError(problem, HAS_TO_BE)


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index names."""
    files = [inside(folder, name, index) for name in fits(IndexForm, read_object(index), index).files]
    for file in files:
        if file.parent != folder or file.suffix != TENSORS:
            raise UsageError(f"{index} names {file.name}, which is no {TENSORS} beside it", COPY_AGAIN)
        if not file.is_file():
            raise MachineError(f"{folder} lacks {file.name}, which its index names", "fetch the pipeline again")
    return files


def _without_weights(folder: Path) -> UsageError:
    """What is said of a part without weights that are taken."""
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickles:
        return UsageError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened; it was not",
            "if you trust its source, diffusers writes safetensors: "
            "`DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(OTHER)`",
        )
    return UsageError(f"{folder} holds no weights (diffusion_pytorch_model{TENSORS} or model{TENSORS})", COPY_AGAIN)


def _kept(folder: Path) -> list[Path]:
    """Files right in a folder that hold no weights."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in KEPT)
    ours = set(folder.glob(WEIGHT_INDEX))
    return [file for file in files if not file.name.startswith(".") and (".index." not in file.name or file in ours)]


def _all(folder: Path) -> Iterator[Path]:
    """Every file below a folder, but hidden ones.

    Raises:
        UsageError: a link that leads out of its folder.
    """
    refuse_links(folder, besides=(TENSORS,))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _all(path)
        elif path.is_file():
            yield path
