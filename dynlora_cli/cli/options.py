"""Options that several commands share, and what a shell completes of them: files, folders and words of ours.

Where nothing of ours begins with what was typed, a shell completes names of files as ever.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli import plugins
from dynlora_cli.config.dtypes import BYTES


def words(*choices: str) -> Callable[[str], list[str]]:
    """Completes one of some words."""
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


def plug_ins(kind: str) -> Callable[[str], list[str]]:
    """Completes the name of a plug-in; not asked for before somebody presses Tab."""
    return lambda incomplete: words(*plugins.names(kind))(incomplete)


def recipes(incomplete: str) -> list[str]:
    """Completes recipes here, and in the folders here."""
    begun = glob.escape(incomplete)
    found = [path for end in ("*", "*/*") for kind in ("yaml", "yml") for path in glob.glob(f"{begun}{end}.{kind}")]
    return sorted(path for path in found if Path(path).name != "mkdocs.yml")


def adapters(incomplete: str) -> list[str]:
    """Completes folders with an adapter in them, down to the third level from here."""
    begun = glob.escape(incomplete)
    found = [path for end in ("*", "*/*", "*/*/*") for path in glob.glob(f"{begun}{end}/adapter_config.json")]
    return sorted(str(Path(path).parent) for path in found if "checkpoints" not in Path(path).parts)


SavedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Number format of the saved factors: float32, bf16 or fp8.",
        autocompletion=words(*BYTES),
        show_default=False,
    ),
]


AnyDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Number format of the saved factors: float32, bf16 or fp8; of a pipeline's LoRA float32, fp16 or bf16, "
        "and by default as it came.",
        autocompletion=words(*BYTES, "fp16"),
        show_default=False,
    ),
]

AdapterPath = Annotated[
    Path,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        autocompletion=adapters,
        help="A run folder, any PEFT LoRA, or the LoRA file of an image pipeline; a folder of runs means the newest of "
        "them, a sweep's folder its best.",
        show_default=False,
    ),
]


Adapters = Annotated[
    list[Path],
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        autocompletion=adapters,
        help="A run folder, any PEFT LoRA, or the LoRA file of an image pipeline; a folder of runs means the newest of "
        "them, a sweep's folder its best. Repeatable.",
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
