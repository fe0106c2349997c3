"""`dynlora train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dynlora_cli import plugins
from dynlora_cli.cli.options import Columns, SavedDtype, recipes
from dynlora_cli.cli.reporting import AsJson, console, opened, reporting, typed
from dynlora_cli.cli.values import column_names, saved_dtype, size
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.execution import elastic
from dynlora_cli.execution.cores import usable_cores
from dynlora_cli.execution.launch import end_with_launcher, is_main_process, launch
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.cli.views.console import Console
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.drafts.named import Named


RecipeFiles = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[RECIPE.yaml]...",
        help="The recipe; without one, --model and --dataset. Several train side by side on one base.",
        show_default=False,
        autocompletion=recipes,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Without a recipe: a folder, a hub id or builtin:tiny.", show_default=False
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="PATH", help="Without a recipe: a file, folder or hub data set.", show_default=False
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Without a recipe: average rank (8), share of the start (0.5), parameters (2M), bytes (200kB), or auto.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as rank.budget=4. Repeatable."),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=A,B",
        help="Train once for each value, in a folder of its own; repeated: for each combination.",
    ),
]
SideBySide = Annotated[
    bool,
    typer.Option("--side-by-side", help="Train the runs of a sweep at once: their rows share each pass."),
]
OutputDir = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Where the run goes, in place of the recipe's.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the newest valid checkpoint.")]
ResumeFrom = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Go on with this checkpoint folder.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, load no weights, write nothing.")]
Devices = Annotated[
    str, typer.Option(metavar="N|all", help="Processes to train with, one per GPU.", show_default=False)
]


def train(
    context: typer.Context,
    files: RecipeFiles = None,
    model: ModelName = None,
    dataset: DatasetName = None,
    budget: Budget = None,
    columns: Columns = None,
    overrides: Overrides = None,
    sweep: Sweeps = None,
    together: SideBySide = False,
    dtype: SavedDtype = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    dry_run: DryRun = False,
    devices: Devices = "1",
    as_json: AsJson = False,
) -> None:
    """Train an adapter: from a recipe, or from a model and rows."""
    if sweep or together or len(files or ()) > 1:
        _several(context)
        return
    recipe = files[0] if files else None
    with reporting(as_json) as result, ExitStack() as held:
        view = console()
        given = Given(model, dataset, budget, columns)
        checked, text, named = _asked(recipe, given, _changes(overrides, dtype), output_dir)
        from dynlora_cli.cli import asked  # not before the recipe is read: it takes longer

        asked.refuse_both_ways(overwrite, resume, resume_from)
        ways, again = elastic.ways(Path(checked.output_dir), elastic.Ways(overwrite, resume, resume_from))
        if dry_run:
            from dynlora_cli.commands import preflight

            preflight.training(checked, writes=False)
        else:  # as the only writer of the output folder, until the command ends
            held.enter_context(asked.training(checked, **ways._asdict()))
        if devices != "1" and "RANK" not in os.environ:
            held.close()  # the first of the processes takes it
            _launch(devices, context.obj)
        end_with_launcher()
        notes = [*(named.notes if named else ()), elastic.note(), again]
        for note in filter(None, notes if is_main_process() else ()):
            view.note(note)
        if dry_run:
            result.update({"ok": True, "plan": _planned(checked, None if as_json else view)})
            return
        from dynlora_cli.commands import train as command

        with view.train_view() as listener:
            summary = command.run(checked, listener=listener, recipe_text=text, **ways._asdict())
        summary = {**summary, "next": _next_commands(summary, checked)}
        if named:
            summary |= {"recipe": str(named.path), "next": [*summary["next"], typed(*named.again)]}
        result.update(summary)
        if is_main_process():
            view.show_summary(summary)


def _changes(overrides: Sequence[str] | None, dtype: str | None) -> list[str]:
    """Changes of the recipe, with what an option of its own stands for."""
    return [*(overrides or ()), *([f"adapter.save_dtype={saved_dtype(dtype)}"] if dtype else [])]


class Given(NamedTuple):
    """What stands for a recipe."""

    model: str | None
    dataset: str | None
    budget: str | None
    columns: str | None


def _asked(
    recipe: Path | None, given: Given, overrides: Sequence[str], output_dir: str | None
) -> tuple[Recipe, str | None, Named | None]:
    """The recipe, what the run folder keeps of its text, and what was found where there is no file.

    Raises:
        UsageError: there is a file, and what stands for one.
    """
    if recipe is not None:
        _refuse_names(recipe, given)
        return *_from_file(recipe, overrides, output_dir), None
    names = column_names(given.columns) if given.columns else None
    if given.budget is not None:
        size(given.budget, "--budget")
    from dynlora_cli.drafts.named import named_run

    found = named_run(
        given.model, given.dataset, budget=given.budget, columns=names, overrides=overrides, output_dir=output_dir
    )
    return found.recipe, found.text, found


def _refuse_names(recipe: Path, given: Given) -> None:
    """Refuse options that stand for a recipe beside one.

    Raises:
        UsageError: there are some.
    """
    keys = {"model": "model", "dataset": "dataset", "budget": "rank.budget", "columns": "dataset.train.0.columns"}
    if wrong := [name for name, value in given._asdict().items() if value is not None]:
        changes = " ".join(f"--set {keys[name]}=..." for name in wrong)
        raise UsageError(
            f"{', '.join(f'--{name}' for name in wrong)}: {recipe} says that already",
            f"to change what it says, write {changes}; or leave the recipe out",
        )


def _from_file(recipe: Path, overrides: Sequence[str], output_dir: str | None) -> tuple[Recipe, str | None]:
    """A recipe file, checked; and its text, if it lies in its own run folder, which a new run would empty."""
    from dynlora_cli.config.load import load_recipe
    from dynlora_cli.drafts.named import settled
    from dynlora_cli.runs.folder import RECIPE

    checked = load_recipe(recipe, overrides, output_dir)
    kept = (Path(checked.output_dir) / RECIPE).absolute() == recipe.absolute()
    text = recipe.read_text(encoding="utf-8-sig") if kept else ""
    return checked, settled(text, str(recipe), overrides, output_dir) if kept else None


def _several(context: typer.Context) -> None:
    """Train all runs of a sweep, or of several recipes."""
    options = context.params
    changes = _changes(options["overrides"], options["dtype"])
    with reporting(options["as_json"]) as result:
        if len(options["files"] or ()) > 1:
            from dynlora_cli.cli.sweeps.lanes import side_by_side

            result.update(side_by_side(options["files"], changes, options))
        elif not options["sweep"]:
            raise UsageError("--side-by-side is for several runs, and there is one", "add --sweep, or another recipe")
        else:
            result.update(_sweep(context, changes))
    if result.get("exit_code"):  # not an error: the table is the result, also where runs have failed
        raise typer.Exit(result["exit_code"])


def _sweep(context: typer.Context, changes: Sequence[str]) -> dict[str, Any]:
    """Train all runs of a sweep."""
    from dynlora_cli.cli import asked
    from dynlora_cli.cli.sweeps.run import Asked, sweep
    from dynlora_cli.config.load import load_recipe

    options = context.params
    recipe, given = next(iter(options["files"] or ()), None), Given(*(options[name] for name in Given._fields))
    ways = {name: options[name] for name in ("overwrite", "resume", "dry_run", "as_json", "together")}
    if recipe is not None:
        _refuse_names(recipe, given)
    asked.refuse_both_ways(options["overwrite"], options["resume"], options["resume_from"])
    if options["resume_from"]:
        raise UsageError("--resume-from goes on with a single run", "with --sweep, --resume goes on with all of them")
    if "RANK" in os.environ:
        raise UsageError("--sweep starts the processes of its runs itself", "leave torchrun out; add --devices N")

    def load(settings: Sequence[str], folder: str | None) -> Recipe:
        out = folder or options["output_dir"]
        if recipe is None:
            return _asked(None, given, [*changes, *settings], out)[0]
        return load_recipe(recipe, changes, out, settings)

    several = None if options["devices"] == "1" else lambda: _device_count(options["devices"])
    return sweep(Asked(options["sweep"], changes, load, arguments=context.obj, devices=several, **ways))


def _planned(recipe: Recipe, view: Console | None) -> dict[str, Any]:
    """What a run would do; shown, if there is a view."""
    from dynlora_cli.cli.views.plan import show_plan
    from dynlora_cli.commands.dry_run import plan

    planned = plan(recipe)
    if view is not None:
        show_plan(view, planned)
    return planned


def _next_commands(summary: dict[str, Any], recipe: Recipe) -> list[str]:
    """Commands that make sense after a run."""
    folder = summary["output_dir"]
    if plugins.declared("variants", recipe.adapter.variant, "hypernet"):
        reads = plugins.declared("hypernets", recipe.adapter.variant, "READS")
        source = ("--document", "FILE") if reads == "document" else ("--description", "TEXT")
        adapt = typed("adapt", "--hypernet", folder, *source, "--out", "FOLDER")
        return [typed("eval", "--adapter", folder), adapt, opened(Path(folder) / "report.html")]
    if "ranks" not in summary:
        return []
    timed = "timestep" in (plugins.declared("variants", recipe.adapter.variant, "GOES_BY") or "")
    small = ["--budget", "auto", "--policy", "magnitude" if timed else "activation", "--out", f"{folder}-small"]
    small += ["--dtype", summary["save_dtype"]] if summary.get("save_dtype") else []
    writes_text = not plugins.declared("tasks", recipe.model.task, "SILENT")
    return [
        typed("eval", "--adapter", folder),
        *([typed("chat", "--adapter", folder)] if writes_text else []),
        typed("prune", "--adapter", folder, *small),
        typed("merge", "--adapter", folder, *(("--at-step", "300") if timed else ())),
        opened(Path(folder) / "report.html"),
    ]


def _launch(devices: str, arguments: Sequence[str]) -> None:
    """Run this very command in several processes, one per device, and end with their exit code."""
    count = _device_count(devices)
    if count > 1:
        raise typer.Exit(launch(arguments, count))


def _device_count(devices: str) -> int:
    """How many processes to train with."""
    if devices != "all" and not (devices.isdecimal() and int(devices) > 0):
        raise UsageError(f"--devices {devices} is neither a number nor 'all'", "for example --devices 2")
    import torch

    available = torch.cuda.device_count()
    if devices == "all":
        return max(1, available)
    if available and int(devices) > available:
        raise MachineError(f"--devices {devices}: this machine has {available} GPUs", "use --devices all")
    # On CPUs each process holds the model in the one memory; two are for trying out what several GPUs would do.
    most = max(2, usable_cores())
    if not available and int(devices) > most:
        cores = counted(usable_cores(), "usable CPU core")
        raise MachineError(
            f"--devices {devices}: this machine has no GPU and {cores}", f"use --devices {most} or fewer"
        )
    return int(devices)
