"""The commands that help a person to begin: `dynlora init`, `doctor` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.reporting import AsJson, console, reporting
from dynlora_cli.errors import MachineError, UsageError


def init(
    data: Annotated[
        str, typer.Argument(metavar="[DATA]", help="A file, folder or hub data set to train on.")
    ] = "builtin:stdlib-docs",
    model: Annotated[str, typer.Option(metavar="NAME", help="A folder, a hub id or builtin:tiny.")] = "builtin:tiny",
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="OURS=THEIRS,...", help="Names of the data's columns, where they are not ours.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="RECIPE.yaml", help="The file to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe for your rows."""
    with reporting(as_json) as result:
        named = _columns(columns) if columns else {}
        from dynlora_cli.cli.views.start import show_starter
        from dynlora_cli.commands import init as starter

        result.update(starter.run(data, out, model=model, columns=named, overwrite=overwrite))
        show_starter(console(), result)


def _columns(text: str) -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping."""
    named = {}
    for part in text.split(","):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not (ours and equals and theirs):
            raise UsageError(
                f"--columns {text}: {part!r} is not OURS=THEIRS",
                f"such as {ours or 'prompt'}=NAME, where NAME is a column of the data; commas go between several",
            )
        named[ours] = theirs
    return named


def doctor(as_json: AsJson = False) -> None:
    """Look for faults in what is installed and in the machine."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.views.start import show_findings
        from dynlora_cli.commands import doctor as command

        result.update(command.run())
        show_findings(console(), result["findings"])
    if not result["ok"]:  # no exception: the findings are the result, whatever they are
        raise typer.Exit(MachineError.exit_code)


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools."""
    from dynlora_cli.config.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (init, doctor, schema):
        app.command()(command)
