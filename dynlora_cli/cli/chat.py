"""The command line of `dynlora chat`: its options, and which kind of screen it talks on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from dynlora_cli.cli.generate import (
    AsLines,
    Compare,
    DoSample,
    LibraryFolder,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Router,
    Seed,
    StopStrings,
    System,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
    check_named,
    folders_of,
    kwargs_of,
    sampling_of,
    settings_of,
    uses_of,
)
from dynlora_cli.cli.options import Base, PlugInOptions, adapters
from dynlora_cli.cli.reporting import Trust, console, reporting

if TYPE_CHECKING:
    from dynlora_cli.commands.chat import Screen

TalkingAdapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        autocompletion=adapters,
        help="A run folder or any PEFT LoRA; by default the newest run below ./out. The first one answers until "
        "/adapter names another. Repeatable.",
        show_default=False,
    ),
]
Use = Annotated[
    str | None,
    typer.Option(
        metavar="base|NAME|MIX|auto",
        help="Who answers at first: the base, an adapter, a mix such as A+B or 0.7*A+0.3*B, or whom a router chooses.",
        show_default=False,
    ),
]


def chat(
    context: typer.Context,
    adapter: TalkingAdapters = None,
    library: LibraryFolder = None,
    use: Use = None,
    router: Router = None,
    set_: PlugInOptions = None,
    compare: Compare = False,
    system: System = None,
    chat_template_kwargs: TemplateKwargs = None,
    max_new_tokens: MaxNewTokens = 256,  # noqa: ARG001 - this and the others below by `context`
    do_sample: DoSample = False,  # noqa: ARG001
    temperature: Temperature = None,  # noqa: ARG001
    top_p: TopP = None,  # noqa: ARG001
    top_k: TopK = None,  # noqa: ARG001
    min_p: MinP = None,  # noqa: ARG001
    repetition_penalty: RepetitionPenalty = 1.0,  # noqa: ARG001
    seed: Seed = None,  # noqa: ARG001
    stop_strings: StopStrings = None,  # noqa: ARG001
    base: Base = None,
    trust_remote_code: Trust = False,
    as_json: AsLines = False,
) -> None:
    """Talk with adapters and their base. /help there lists the commands. Without a terminal each line is a turn."""
    out, stdin = sys.stdout, sys.stdin
    with reporting(as_json, lines=True):
        sampling_of(context)
        kwargs = kwargs_of(chat_template_kwargs)
        options = set_ or []
        uses = uses_of([use] if use else [], router, options, compare)
        folders = folders_of(adapter or [], library, base)
        check_named(folders, library, base, router, options, uses)
        from dynlora_cli.cli.views.answers import ReaderGoneError
        from dynlora_cli.cli.views.chat import as_it_was
        from dynlora_cli.commands import chat as command
        from dynlora_cli.generation.opening import Wanted

        wanted = Wanted(folders, library, base, router, options, trust_remote_code)
        start = command.Start(next(iter(uses), None), compare, system, settings_of(context), kwargs)
        screen = _screen(stdin, out, as_json)
        try:
            with as_it_was(out):
                command.run(wanted, start, screen)
        except ReaderGoneError:
            raise typer.Exit(0) from None


def _screen(stdin: TextIO, out: TextIO, as_json: bool) -> Screen:
    """What fits where the lines come from and the answers go."""
    from dynlora_cli.cli.views.chat import JsonScreen, LineScreen, TerminalScreen

    if as_json:
        return JsonScreen(console(), stdin, out)
    return TerminalScreen(out) if stdin.isatty() and out.isatty() else LineScreen(console(), stdin, out)
