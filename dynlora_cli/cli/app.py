"""The command line: thin commands. What they share, exit codes too, is in cli/reporting.py.

Nothing heavy is imported before a command has read and checked what it was given.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dynlora_cli import __version__
from dynlora_cli.cli import adapters as cli_adapters
from dynlora_cli.cli import eval as cli_eval
from dynlora_cli.cli import start as cli_start
from dynlora_cli.cli.reporting import AsJson, console, reporting, typed
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.execution.launch import end_with_launcher, is_main_process, launch

app = typer.Typer(
    name="dynlora",
    help="Fine-tune language models with LoRA as a sum of rank-1 components, pruned under one global budget.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"dynlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA as a sum of rank-1 components, pruned under one global budget."""


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as rank.budget=4. Repeatable."
        ),
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the run goes, in place of the recipe's.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest valid checkpoint.")] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on with this checkpoint folder.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, load no weights, write nothing.")
    ] = False,
    devices: Annotated[
        str, typer.Option(metavar="N|all", help="Processes to train with, one per GPU.", show_default=False)
    ] = "1",
    as_json: AsJson = False,
) -> None:
    """Train an adapter from a recipe."""
    with reporting(as_json) as result, ExitStack() as held:
        if overwrite and (resume or resume_from):
            raise UsageError("--overwrite and --resume exclude each other", "choose one of them")
        from dynlora_cli.config.load import load_recipe

        checked = load_recipe(recipe, overrides or (), output_dir)
        view = console()
        from dynlora_cli.cli import preflight

        if dry_run:
            preflight.training(checked, writes=False)
        elif is_main_process():  # as the only writer of the output folder, until the command ends
            from dynlora_cli.runs.folder import place_of

            held.enter_context(place_of(Path(checked.output_dir)))
            preflight.training(checked, writes=True, overwrite=overwrite, resume=resume, resume_from=resume_from)
        if devices != "1" and "RANK" not in os.environ:
            held.close()  # the first of the processes takes it
            _launch(devices, context.obj)
        end_with_launcher()
        if dry_run:
            from dynlora_cli.training.dry_run import plan as plan_run

            plan = plan_run(checked)
            result.update({"ok": True, "plan": plan})
            if not as_json:
                from dynlora_cli.cli.views.plan import show_plan

                show_plan(view, plan)
            return
        from dynlora_cli.commands import train as command

        with view.train_view() as listener:
            summary = command.run(
                checked,
                listener=listener,
                overwrite=overwrite,
                resume=resume,
                resume_from=resume_from,
            )
        summary = {**summary, "next": _next_commands(summary)}
        result.update(summary)
        if is_main_process():
            view.show_summary(summary)


cli_adapters.register(app)
cli_eval.register(app)
cli_start.register(app)


def _next_commands(summary: dict[str, Any]) -> list[str]:
    """Commands that make sense after a run."""
    if "ranks" not in summary:
        return []
    folder = summary["output_dir"]
    python = "python" if shutil.which("python") else "python3"
    small = ["--budget", "auto", "--policy", "activation", "--out", f"{folder}-small"]
    return [
        typed("eval", "--adapter", folder),
        typed("prune", "--adapter", folder, *small),
        typed("merge", "--adapter", folder),
        shlex.join([python, "-m", "webbrowser", str((Path(folder) / "report.html").resolve())]),
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
    return int(devices)


def _at_home(argument: str) -> str:
    """An argument in which ~ stands for the home folder, also after `--option=`, where shells leave it as it is.

    Raises:
        BadParameter: of a user whom this machine does not know.
    """
    option, equals, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    if not value.startswith("~") or Path(value).exists():
        return argument
    try:
        return f"{option}{equals}{Path(value).expanduser()}"
    except RuntimeError:
        raise typer.BadParameter(f"{value}: this machine has no such user; write the path out") from None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The `dynlora` command: does what `arguments` say (by default the process's own) and exits with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch reads it: its threads sleep while they wait. Else they spin, and where others use the cores as well a
    # step may take ten times as long (scripts/bench/NOTES.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments = [_at_home(argument) for argument in arguments]
        code = app(arguments, prog_name="dynlora", obj=arguments, standalone_mode=False)
    except typer.TyperException as error:  # an unknown command or option: typer words it, for people
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code
        if "--json" in arguments:
            print(json.dumps({"ok": False, "error": error.format_message(), "exit_code": code}))
    sys.exit(code)
