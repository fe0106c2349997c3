"""The runs of a sweep: checked together, trained here or launched on several devices, and shown as one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.cli.reporting import console, opened, typed
from dynlora_cli.config.sweep import SEED, Grid, Load, make_grid, read_axes
from dynlora_cli.errors import DynloraError, Interrupted, MachineError, MeasureError, UsageError

if TYPE_CHECKING:
    from dynlora_cli.cli.views.console import Console
    from dynlora_cli.commands.sweep import Train

ERRORS = {error.exit_code: error for error in (UsageError, MachineError, MeasureError)}
OF_THE_SWEEP = ("--sweep", "--output-dir")  # options with a value that a single run of it has otherwise
FLAGS = ("--json", "--overwrite", "--resume")


@dataclass(frozen=True)
class Asked:
    """What a person has typed.

    Attributes:
        sweeps: texts of `--sweep`.
        changes: texts of `--set`, which hold for all runs.
        load: makes the recipe of a run.
        overwrite, resume, dry_run, as_json: the flags.
        arguments: of the whole command.
        devices: tells how many processes train a run; None: this one does.
        together: side by side on one base.
    """

    sweeps: Sequence[str]
    changes: Sequence[str]
    load: Load
    overwrite: bool
    resume: bool
    dry_run: bool
    as_json: bool
    arguments: Sequence[str]
    devices: Callable[[], int] | None
    together: bool = False


def sweep(asked_for: Asked) -> dict[str, Any]:
    """Do it.

    Returns:
        The result, with `exit_code` where runs have failed.

    Raises:
        UsageError, MachineError, DataError: every problem of any run, before anything runs.
        Interrupted: Ctrl-C; `--resume` goes on.
    """
    from dynlora_cli.cli import asked
    from dynlora_cli.commands import preflight
    from dynlora_cli.commands import sweep as command

    grid, view = make_grid(read_axes(asked_for.sweeps, asked_for.changes), asked_for.load), console()
    if asked_for.together:
        _refuse_together(grid, asked_for)
    if asked_for.dry_run:
        command.check(grid, preflight.training, writes=False)
        return _planned(grid, None if asked_for.as_json else view)
    from dynlora_cli.cli.views.sweep import SweepView, show_sweep

    with ExitStack() as held:
        standing = held.enter_context(asked.sweeping(grid, overwrite=asked_for.overwrite, resume=asked_for.resume))
        if asked_for.together:
            result = _together(grid, standing, held)
        else:
            count = asked_for.devices() if asked_for.devices else 1
            listener = held.enter_context(SweepView(view))
            train = _here(listener) if count == 1 else _launched(asked_for.arguments, count)
            result = command.Sweep(grid, standing, listener).run(train)
    result["next"] = list(_next_commands(result))
    show_sweep(view, result)
    if not result["ok"]:
        view.error(DynloraError(result["error"], command.GO_ON))
    return result


def _here(listener: Callable[[dict[str, Any]], None]) -> Train:
    """Trains a run in this process, as `dynlora train` would."""
    from dynlora_cli.cli import asked, faults

    def train(member: Any, *, overwrite: bool, resume: bool, load: Callable[..., Any]) -> dict[str, Any]:
        with faults.translated(), asked.training(member.recipe, overwrite=overwrite, resume=resume):
            from dynlora_cli.commands import train as command

            return command.run(member.recipe, listener=listener, overwrite=overwrite, resume=resume, load=load)

    return train


def _refuse_together(grid: Grid, asked_for: Asked) -> None:
    """Refuse a sweep whose runs cannot train side by side.

    Raises:
        UsageError: they cannot, with every reason.
    """
    from dynlora_cli.config.side_by_side import refuse_apart

    if asked_for.devices:
        raise UsageError("--side-by-side trains in one process, on one device", "leave --devices out")
    refuse_apart({member.name: member.recipe for member in grid.members})


def _together(grid: Grid, standing: Mapping[str, Any], held: ExitStack) -> dict[str, Any]:
    """Trains all runs side by side."""
    from dynlora_cli.cli import asked, faults
    from dynlora_cli.cli.views.lanes import LanesView
    from dynlora_cli.commands import sweep as command
    from dynlora_cli.commands import train as one

    view = held.enter_context(LanesView(console(), [member.name for member in grid.members]))

    def in_lane(lane: Any) -> Train:
        def train(member: Any, *, overwrite: bool, resume: bool, load: Callable[..., Any]) -> dict[str, Any]:
            ways: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
            with faults.translated(), asked.training(member.recipe, **ways):
                return one.run(member.recipe, listener=partial(view.hear, member.name), load=load, lane=lane, **ways)

        return train

    return command.Sweep(grid, standing, lambda event: view.console.note(event["text"])).run_together(
        in_lane, view.row_ended
    )


def _launched(arguments: Sequence[str], count: int) -> Train:
    """Trains a run in several processes, which a command of its own starts; each reads the rows itself."""
    from dynlora_cli.execution.launch import launch
    from dynlora_cli.runs.folder import read_record

    def train(member: Any, *, overwrite: bool, resume: bool, load: Callable[..., Any]) -> dict[str, Any]:  # noqa: ARG001
        settings = [word for setting in member.settings for word in ("--set", setting)]
        flags = ["--overwrite"] * overwrite + ["--resume"] * resume
        code = launch([*_of_all(arguments), *settings, "--output-dir", str(member.folder), *flags], count)
        if code == Interrupted.exit_code:
            raise Interrupted("its state is saved")
        if code:
            raise ERRORS.get(code, DynloraError)(f"ended with exit code {code}, and said why above")
        return dict(read_record(member.folder)["summary"])

    return train


def _of_all(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments that each run of a sweep shares."""
    words = iter(arguments)
    for word in words:
        if word in OF_THE_SWEEP:
            next(words, None)
        elif word not in FLAGS and not word.startswith(tuple(f"{option}=" for option in OF_THE_SWEEP)):
            yield word


def _planned(grid: Grid, view: Console | None) -> dict[str, Any]:
    """What the runs would do: one of each combination is planned whole."""
    from dynlora_cli.cli.views.sweep import show_sweep_plan
    from dynlora_cli.commands.dry_run import plan

    plans: dict[str, dict[str, Any]] = {}
    seen = []
    for member in grid.members:
        rest = {key: value for key, value in member.values.items() if key != SEED}
        if rest not in seen:
            seen.append(rest)
            plans[member.name] = plan(member.recipe)
    if view is not None:
        show_sweep_plan(view, grid, plans)
    runs = [
        {"run": one.name, "folder": str(one.folder), "values": dict(one.values), "plan": plans.get(one.name)}
        for one in grid.members
    ]
    return {"ok": True, "plan": {"output_dir": str(grid.folder), "count": len(runs), "runs": runs}}


def _next_commands(result: Mapping[str, Any]) -> Iterator[str]:
    """Commands that make sense after a sweep: with its best run, and against the second best."""
    rows = {row["run"]: row for row in result["runs"]}
    if best := rows.get(result["best"] or ""):
        yield typed("eval", "--adapter", best["folder"])
        if other := _runner_up(result, best):
            yield typed("eval", "--adapter", best["folder"], "--adapter", other["folder"])
        yield typed("merge", "--adapter", best["folder"])
    yield opened(Path(result["output_dir"]) / "sweep.html")


def _runner_up(result: Mapping[str, Any], best: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The run of the second best combination with the best run's seed: with another, it has seen other rows."""
    measured = [one for one in result["combinations"] if "loss" in one["mean"] and not one["best"]]
    second = min(measured, key=lambda one: one["mean"]["loss"], default=None)
    for row in result["runs"]:
        alike = row["values"].get(SEED) == best["values"].get(SEED)
        if second and row["run"] in second["runs"] and row["state"] == "done" and alike and row is not best:
            return dict(row)
    return None
