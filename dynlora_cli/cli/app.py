"""The command line: thin commands. What they share, exit codes too, is in cli/reporting.py.

Nothing heavy is imported before a command has read and checked what it was given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dynlora_cli import __version__
from dynlora_cli.cli.adapt import adapt
from dynlora_cli.cli.chat import chat
from dynlora_cli.cli.doctor import doctor
from dynlora_cli.cli.eval import evaluate
from dynlora_cli.cli.export import export
from dynlora_cli.cli.generate import generate
from dynlora_cli.cli.init import init
from dynlora_cli.cli.inspect import inspect
from dynlora_cli.cli.library import library
from dynlora_cli.cli.merge import merge
from dynlora_cli.cli.prune import prune
from dynlora_cli.cli.schema import schema
from dynlora_cli.cli.serve import serve
from dynlora_cli.cli.train import train
from dynlora_cli.execution.cores import limit_threads

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


app.command()(train)
app.command()(adapt)
app.command()(prune)
app.command()(merge)
app.command()(export)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.add_typer(library)
app.command()(serve)
app.command()(init)
app.command()(doctor)
app.command()(schema)


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


def _open_streams() -> None:
    """Put nothing in the place of a closed stdin, stdout or stderr (`>&-`), which Python gives as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - it stays to the end


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The `dynlora` command: does what `arguments` say (by default the process's own) and exits with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    # Before torch reads it: its threads sleep while they wait. Else they spin, and where others use the cores as well a
    # step may take ten times as long (scripts/bench/NOTES.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    limit_threads()
    try:
        arguments = [_at_home(argument) for argument in arguments]
        code = app(arguments, prog_name="dynlora", obj=arguments, standalone_mode=False)
    except typer.TyperException as error:  # an unknown command or option: typer words it, for people
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code
        if "--json" in arguments:
            print(json.dumps({"ok": False, "error": error.format_message(), "exit_code": code}))
    sys.exit(code)
