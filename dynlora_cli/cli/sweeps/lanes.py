"""`dynlora train A.yaml B.yaml ...`: recipes that are checked together and trained side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.cli.reporting import console, typed
from dynlora_cli.config.side_by_side import refuse_apart
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.execution.lost import several

if TYPE_CHECKING:
    from dynlora_cli.cli.views.console import Console
    from dynlora_cli.cli.views.lanes import LanesView
    from dynlora_cli.commands.train_side_by_side import Planned
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.resume import Standing

ALONE = {
    "sweep": "tries values of one recipe",
    "resume_from": "goes on with a single run; --resume goes on with all of them",
    "model": "stands for a recipe",
    "dataset": "stands for a recipe",
    "budget": "stands for a recipe; write --set rank.budget=...",
    "columns": "stands for a recipe",
}


def side_by_side(files: Sequence[Path], changes: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Train them.

    Args:
        files: two recipes or more.
        changes: texts of `--set`, which hold for all of them.
        options: of the command, by name.

    Returns:
        The result, with `exit_code` where runs have failed.

    Raises:
        UsageError, MachineError, DataError: every problem of any recipe, before anything runs.
        Interrupted: Ctrl-C; `--resume` goes on.
    """
    from dynlora_cli.cli import asked

    _refuse_options(options)
    asked.refuse_both_ways(options["overwrite"], options["resume"], None)
    recipes = _read(files, changes, options["output_dir"])
    refuse_apart(recipes)
    view = console()
    if options["dry_run"]:
        return _planned(recipes, None if options["as_json"] else view)
    with ExitStack() as held:
        standing = _held(held, recipes, overwrite=options["overwrite"], resume=options["resume"])
        from dynlora_cli.cli.views.lanes import LanesView, show_lanes
        from dynlora_cli.commands import train_side_by_side as command

        runs = [command.Planned(name, recipe, standing[name]) for name, recipe in recipes.items()]
        shown = held.enter_context(LanesView(view, list(recipes)))
        result = command.run(runs, _trainer(shown), shown.ended)
    folders = [row["output_dir"] for row in result["runs"] if row["state"] == "done"]
    result["next"] = [typed("eval", *(word for folder in folders for word in ("--adapter", folder)))] if folders else []
    show_lanes(view, result)
    if not result["ok"]:
        view.error(DynloraError(result["error"], command.GO_ON))
    return result


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse what is for a single recipe."""
    for name, why in ALONE.items():
        if options[name]:
            raise UsageError(f"--{name.replace('_', '-')} {why}, and there are several recipes", "name one recipe")
    if options["devices"] != "1" or several():
        raise UsageError(
            "several recipes train side by side in one process, on one device", "leave --devices, or torchrun, out"
        )


def _read(files: Sequence[Path], changes: Sequence[str], parent: str | None) -> dict[str, Recipe]:
    """The recipes by what they are called: their files' names, or whole paths where those are alike.

    Args:
        files, changes: as above.
        parent: of the run folders, which are named as the files then; None: as the recipes say.
    """
    from dynlora_cli.config.load import load_recipe

    stems = [file.stem for file in files]
    alike = len(set(stems)) < len(stems)
    if alike and parent:
        raise UsageError("--output-dir: two recipes have the same file name", "rename one, or leave --output-dir out")
    names = [str(file) for file in files] if alike else stems
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{twice} is given twice", "name each recipe once")
    return {
        name: load_recipe(file, changes, str(Path(parent) / file.stem) if parent else None)
        for name, file in zip(names, files, strict=True)
    }


def _held(held: ExitStack, recipes: Mapping[str, Recipe], *, overwrite: bool, resume: bool) -> dict[str, Standing]:
    """Hold all output folders, and check what the runs need of the disk; how each of them stands.

    Raises:
        UsageError, MachineError, DataError: every problem, once.
    """
    from dynlora_cli.cli import asked
    from dynlora_cli.config.resume import standing_of
    from dynlora_cli.runs.folder import place_of

    found: dict[str, Standing] = {}
    faults: dict[str, DynloraError] = {}
    for name, recipe in recipes.items():
        try:
            held.enter_context(place_of(Path(recipe.output_dir)))
            stands = standing_of(Path(recipe.output_dir), recipe, overwrite=overwrite, resume=resume)
            goes_on = stands in ("go on", "finished")
            held.enter_context(asked.training(recipe, overwrite=stands == "anew", resume=goes_on))
            found[name] = stands
        except DynloraError as error:
            faults.setdefault(error.message, error)
    if faults:
        first, *others = faults.values()
        raise type(first)("\n".join(faults), first.hint) if others else first
    return found


def _trainer(shown: LanesView) -> Any:
    """Trains one of the runs; rows that several of them read alike are read once."""
    from dynlora_cli.cli import faults
    from dynlora_cli.commands import train as command
    from dynlora_cli.commands.sweep import SharedRows

    shared = SharedRows()

    def train(planned: Planned, **ways: Any) -> dict[str, Any]:
        with faults.translated():
            load, listener = shared.of(planned.recipe), partial(shown.hear, planned.name)
            return command.run(planned.recipe, listener=listener, load=load, **ways)

    return train


def _planned(recipes: Mapping[str, Recipe], view: Console | None) -> dict[str, Any]:
    """What the runs would do; shown one after the other, if there is a view."""
    from dynlora_cli.cli.views.plan import show_plan
    from dynlora_cli.commands import preflight
    from dynlora_cli.commands.dry_run import plan

    for recipe in recipes.values():
        preflight.training(recipe, writes=False)
    plans = {name: plan(recipe) for name, recipe in recipes.items()}
    for name, planned in plans.items() if view is not None else ():
        assert view is not None
        view.line(f"{name}, side by side with {len(plans) - 1} more")
        show_plan(view, planned)
    return {"ok": True, "plan": {"count": len(plans), "runs": [{"name": n, "plan": p} for n, p in plans.items()]}}
