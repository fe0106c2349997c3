"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AdapterPath = Annotated[
    Path,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder, or any PEFT LoRA folder; a folder that holds none means the newest run below it.",
        show_default=False,
    ),
]


Adapters = Annotated[
    list[Path],
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder, or any PEFT LoRA folder; a folder that holds none means the newest run below it. "
        "Repeatable.",
        show_default=False,
    ),
]


Base = Annotated[
    str | None,
    typer.Option("--base", metavar="FOLDER", help="The base model, in place of the one on record.", show_default=False),
]


PlugInOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the plug-in that was chosen, if it has any. Repeatable.",
        show_default=False,
    ),
]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what dynlora made there before.")]


Columns = Annotated[
    str | None,
    typer.Option(
        metavar="OURS=THEIRS,...", help="Names of the data's columns, where they are not ours.", show_default=False
    ),
]
