"""`dynlora init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import Columns
from dynlora_cli.cli.reporting import AsJson, console, reporting
from dynlora_cli.cli.values import column_names
from dynlora_cli.errors import UsageError

DATA, MODEL = "builtin:stdlib-docs", "builtin:tiny"


def init(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="A file, folder or hub data set to train on.  [default: builtin:stdlib-docs]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A folder, a hub id or builtin:tiny.  [default: builtin:tiny]", show_default=False
        ),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A configuration of axolotl, LLaMA-Factory, TRL, torchtune, ms-swift or Unsloth, to be turned into a "
            "recipe; DATA and --model replace what it names.",
            show_default=False,
        ),
    ] = None,
    from_tool: Annotated[
        str | None,
        typer.Option(metavar="TOOL", help="With --from: whose it is, where the file does not say.", show_default=False),
    ] = None,
    columns: Columns = None,
    out: Annotated[Path, typer.Option(metavar="RECIPE.yaml", help="The file to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe for your rows, or one that trains what another tool's configuration trains."""
    with reporting(as_json) as result:
        named = column_names(columns) if columns else {}
        from dynlora_cli.cli.views.start import show_converted, show_starter
        from dynlora_cli.commands import init as starter

        if from_file is None:
            if from_tool is not None:
                raise UsageError("--from-tool goes with --from", "name the file: --from FILE")
            data, model = (
                DATA if data is None else data,
                MODEL if model is None else model,
            )  # an empty text is a mistake
            found = starter.run(data, out, model=model, columns=named, overwrite=overwrite)
            result.update(found)
            show_starter(console(), result)
            return
        if named:
            raise UsageError("--columns goes without --from", "the recipe has a line for `columns`")
        result.update(starter.from_file(from_file, out, tool=from_tool, model=model, data=data, overwrite=overwrite))
        show_converted(console(), result)
