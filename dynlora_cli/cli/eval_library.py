"""`dynlora eval --library` and `dynlora eval --router`: what goes with them, and the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from dynlora_cli.cli.reporting import console
from dynlora_cli.errors import UsageError

OF_BOTH = {"router", "set_", "explain", "data", "max_samples", "samples", "base", "trust_remote_code", "as_json"}


def one_file(data: Sequence[str] | None, explain: bool, options: Sequence[str] | None) -> Path | None:
    """What `--data` names where nothing is decided.

    Raises:
        UsageError: more than one, or something is asked for that is a router's.
    """
    if explain:
        raise UsageError("--explain is of a library's decisions", "name one with --library LIB, or a --router")
    if options:
        raise UsageError("--set is for the router, and there is none", "name one with --router NAME")
    if data and len(data) > 1:
        raise UsageError(
            "--data is given more than once", "name one file or recipe; several go with --library or --router alone"
        )
    return Path(data[0]) if data else None


def evaluate_library(context: typer.Context) -> dict[str, Any]:
    """Decide and measure, and show it.

    Args:
        context: of `dynlora eval`, whose options say what is wanted.

    Raises:
        UsageError: one of them is for adapters that are measured one by one, or is wrong.
    """
    given, root = context.params, context.params["library"]
    _refuse_others(context, "--library" if root else "--router")
    _refuse_wrong(root, given)  # before anything heavy loads
    from dynlora_cli.cli.views.activation import show_library_evaluation
    from dynlora_cli.commands import evaluate_library as command

    view = console()
    wanted = command.Wanted(
        tuple(given["data"] or ()),
        max_samples=given["max_samples"],
        answers=given["samples"],
        base=given["base"],
        trust_remote_code=given["trust_remote_code"],
        router=given["router"],
        options=tuple(given["set_"] or ()),
        adapters=tuple(given["adapter"] or ()),
    )
    report = command.run(root, wanted, view.line)
    show_library_evaluation(view, report, explain=given["explain"])
    return report


def _refuse_wrong(root: Path | None, given: dict[str, Any]) -> None:
    """Check library, adapters and router, as far as that can be told without loading any.

    Raises:
        UsageError: one is not there, the router has no such option, or nothing is named to decide among.
    """
    from dynlora_cli import plugins
    from dynlora_cli.cli.values import choice
    from dynlora_cli.commands import preflight
    from dynlora_cli.config import options
    from dynlora_cli.library.library import Library
    from dynlora_cli.routing.router import default_router

    library = Library.open(root) if root else None
    if library is None and not given["adapter"]:
        raise UsageError("--router chooses among adapters, and none is named", "name them: --adapter A --adapter B")
    preflight.adapters(given["adapter"] or (), given["base"])
    router = given["router"] or default_router(library)[0]
    choice(router, plugins.names("routers"), "--router")
    options.given("routers", router, given["set_"] or ())


def _refuse_others(context: typer.Context, named: str) -> None:
    """Refuse what a person has typed and a decision has no use for."""
    goes_with_it = OF_BOTH | {"library" if named == "--library" else "adapter"}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in goes_with_it and source is not None and source.name == "COMMANDLINE":
            name = parameter.opts[0] if parameter.opts[0].startswith("-") else "a recipe"
            raise UsageError(f"{named} and {name} do not go together", f"leave out {name}, or measure with --adapter")
