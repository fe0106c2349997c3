"""What the disk alone can answer: a wrong path, an occupied output folder, nothing to resume. No torch needed.

The commands check the same again where they need it; asked here first, a person does not wait for torch to read that a
name is misspelt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dynlora_cli.adapters.find import find_adapter, find_origin, is_for_pipeline, refuse_image
from dynlora_cli.adapters.members import find_members
from dynlora_cli.config.adapter_section import LIBRARY_ROWS
from dynlora_cli.config.load import RECIPES
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.resume import same_recipe
from dynlora_cli.config.sections import Model, Source
from dynlora_cli.data.corpus import files_of
from dynlora_cli.data.descriptions import read_descriptions
from dynlora_cli.data.sources import is_local, tables
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.models.find import find_model, is_hub_name
from dynlora_cli.models.pipelines.parts import open_pipeline
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.training.replay import runs_to_replay


def training(
    recipe: Recipe, *, writes: bool, overwrite: bool = False, resume: bool = False, resume_from: Path | None = None
) -> None:
    """Check what a training run needs of the disk.

    Args:
        recipe: names model, rows and output folder. What a hub has is not looked at here.
        writes: not a dry run.
        overwrite, resume, resume_from: as `train.run` takes them.

    Raises:
        UsageError, MachineError, DataError: as the run itself would.
    """
    folder = Path(recipe.output_dir)
    if resume_from and not resume_from.is_dir():
        example = "name a folder such as out/name/checkpoints/step-100"
        raise UsageError(f"--resume-from: no complete checkpoint: there is no folder {resume_from}", example)
    if recipe.adapter.origin and not (resume or resume_from):
        find_origin(Path(recipe.adapter.origin), folder)
    if resume or resume_from:
        same_recipe(run_folder.run_of(resume_from) if resume_from else folder, recipe)
    elif writes:
        run_folder.refuse_occupied(folder, overwrite=overwrite)
        run_folder.refuse_inputs(folder, inputs(recipe), "--output-dir")
    _model(recipe.model)
    for sources, held_out in ((recipe.dataset.train, False), (recipe.dataset.val, True)):
        for source in sources:
            if is_local(source.path) and source.path != LIBRARY_ROWS:
                tables(source, [], held_out=held_out)
            read_descriptions(source)
    if recipe.dataset.retrieve:
        files_of(recipe.dataset.retrieve.corpus)
    for also in recipe.eval.also or ():
        if is_local(also.path):
            with _named(f"eval.also, {also.name}"):
                tables(also.source, [], held_out=True)
    runs_to_replay(recipe)
    if recipe.adapter.library:
        find_members(recipe.adapter.library, folder)


def inputs(recipe: Recipe) -> list[Path]:
    """The files and folders that a run reads, such as the rows that `dynlora adapt` left in an earlier one.

    Not the adapters and runs that it goes on from: those are checked where they are found.
    """
    dataset, sources = recipe.dataset, [*recipe.dataset.train, *recipe.dataset.val, *(recipe.eval.also or ())]
    paths = [source.path for source in sources if is_local(source.path)]
    paths += [one.descriptions for one in (*dataset.train, *dataset.val) if isinstance(one.descriptions, str)]
    paths += [dataset.retrieve.corpus] if dataset.retrieve else []
    paths += [] if is_hub_name(recipe.model.name_or_path) else [recipe.model.name_or_path]
    return [Path(path).expanduser() for path in paths if not path.startswith("builtin:")]


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of this block say which rows they are of."""
    try:
        yield
    except (UsageError, DataError) as error:
        message = error.message.removeprefix("dataset: ")
        raise type(error)(f"{what}: {message}", error.hint) from None


def adapters(
    folders: Iterable[Path],
    base_name: str | None = None,
    data: Path | None = None,
    also: Mapping[str, Path] | None = None,
    *,
    images: bool = False,
) -> list[Path]:
    """Check that adapters are there, and their base and the rows to look at where these are named.

    Args:
        folders: or files, as a person names them.
        base_name: the base's folder or hub id.
        data, also: rows.
        images: files of adapters for diffusion pipelines are welcome, whose base is a pipeline.

    Returns:
        The folders that hold the adapters.

    Raises:
        UsageError, DataError: as the command itself would.
    """
    found = [find_adapter(folder)[0] for folder in folders]
    if base_name:
        for folder in () if images else found:
            refuse_image(folder)
        (open_pipeline if any(map(is_for_pipeline, found)) else base)(base_name)
    if data is not None and data.suffix.lower() not in RECIPES and is_local(str(data)):
        tables(Source(path=str(data)), [], held_out=True)
    for name, file in (also or {}).items():
        if file.suffix.lower() not in RECIPES and is_local(str(file)):
            with _named(f"--also {name}"):
                tables(Source(path=str(file)), [], held_out=True)
    return found


def base(name: str) -> None:
    """Check that a base model is there, unless it is the hub's to say.

    Raises:
        UsageError: it is not.
    """
    _model(Model(name_or_path=name))


def _model(options: Model) -> None:
    if not is_hub_name(options.name_or_path):
        find_model(options)


def names(folders: Iterable[Path]) -> list[str]:
    """What adapters are called: as their run, or as their folder.

    Args:
        folders: that hold adapters, as `adapters` returns them.
    """
    found = []
    for folder in folders:
        run = folder if (folder / run_folder.RECORD).is_file() else folder.resolve().parent.parent
        record = run_folder.read_record(run) if (run / run_folder.RECORD).is_file() else {}
        found.append(str(record.get("name") or folder.resolve().name))
    return found
