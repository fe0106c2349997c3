"""`dynlora init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import Columns
from dynlora_cli.cli.reporting import AsJson, console, reporting
from dynlora_cli.cli.values import column_names


def init(
    data: Annotated[
        str, typer.Argument(metavar="[DATA]", help="A file, folder or hub data set to train on.")
    ] = "builtin:stdlib-docs",
    model: Annotated[str, typer.Option(metavar="NAME", help="A folder, a hub id or builtin:tiny.")] = "builtin:tiny",
    columns: Columns = None,
    out: Annotated[Path, typer.Option(metavar="RECIPE.yaml", help="The file to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe for your rows."""
    with reporting(as_json) as result:
        named = column_names(columns) if columns else {}
        from dynlora_cli.cli.views.start import show_starter
        from dynlora_cli.commands import init as starter

        result.update(starter.run(data, out, model=model, columns=named, overwrite=overwrite))
        show_starter(console(), result)
