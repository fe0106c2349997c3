"""`dynlora eval --library`: what goes with it, and the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from dynlora_cli.cli.reporting import console
from dynlora_cli.errors import UsageError

GOES_WITH_IT = {"library", "explain", "data", "max_samples", "samples", "base", "trust_remote_code", "as_json"}


def one_file(data: Sequence[str] | None, explain: bool) -> Path | None:
    """What `--data` names where there is no library.

    Raises:
        UsageError: more than one, or an explanation is asked for.
    """
    if explain:
        raise UsageError("--explain is of a library's decisions", "name one with --library LIB")
    if data and len(data) > 1:
        raise UsageError("--data is given more than once", "name one file or recipe; several go with --library alone")
    return Path(data[0]) if data else None


def evaluate_library(context: typer.Context) -> dict[str, Any]:
    """Decide and measure, and show it.

    Args:
        context: of `dynlora eval`, whose options say what is wanted.

    Raises:
        UsageError: one of them is for adapters that are measured one by one.
    """
    from dynlora_cli.library.library import Library

    given, root = context.params, context.params["library"]
    _refuse_others(context)
    Library.open(root)  # before anything heavy loads
    from dynlora_cli.cli.views.activation import show_library_evaluation
    from dynlora_cli.commands import evaluate_library as command

    view = console()
    wanted = command.Wanted(
        tuple(given["data"] or ()),
        max_samples=given["max_samples"],
        answers=given["samples"],
        base=given["base"],
        trust_remote_code=given["trust_remote_code"],
    )
    report = command.run(root, wanted, view.line)
    show_library_evaluation(view, report, explain=given["explain"])
    return report


def _refuse_others(context: typer.Context) -> None:
    """Refuse what a person has typed and a library has no use for."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in GOES_WITH_IT and source is not None and source.name == "COMMANDLINE":
            name = parameter.opts[0] if parameter.opts[0].startswith("-") else "a recipe"
            raise UsageError(f"--library and {name} do not go together", f"leave out {name}, or measure with --adapter")
