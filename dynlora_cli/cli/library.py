"""The command line of `dynlora library`: a group of commands on a folder of adapters."""

from __future__ import annotations

import re
from datetime import date as day
from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import AdapterPath, Base
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, typed
from dynlora_cli.errors import UsageError

library = typer.Typer(
    name="library", help="Keep several adapters of one base, and activate the one that helps.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(metavar="LIB", help="The library's folder.", show_default=False)]
Update = Annotated[str, typer.Argument(metavar="NAME", help="An update in it.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Of the update; by default the run's.", show_default=False),
]
Date = Annotated[
    str | None,
    typer.Option(
        "--date",
        metavar="YYYY-MM-DD",
        help="The day that the update is about, by default that of training; of two that fit the newer is taken.",
        show_default=False,
    ),
]
Tags = Annotated[str | None, typer.Option("--tags", metavar="A,B", help="Words to know it by.", show_default=False)]
Documents = Annotated[
    Path | None,
    typer.Option(
        "--documents",
        metavar="FILE|FOLDER",
        help="Texts, or rows with a column `text`: their passages become keys, too.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Rows to make keys of, in place of the run's own.", show_default=False),
]
EncoderName = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="base|minilm|FOLDER",
        help="What makes keys of texts, for all updates of a library alike. By default the base model itself.",
        show_default=False,
    ),
]


Unrelated = Annotated[
    Path | None,
    typer.Option(
        "--unrelated",
        metavar="FILE",
        help="Requests that no update is about: rows, or a .txt file with one on each line. By default rows about "
        "Python's standard library, and the requests of other updates.",
        show_default=False,
    ),
]
FalseActivation = Annotated[
    str,
    typer.Option("--false-activation", metavar="1%", help="Share of unrelated requests that may activate an update."),
]
AtMost = Annotated[
    int, typer.Option("--at-most", metavar="K", min=1, max=3, help="Updates that are active on one request at most.")
]
Rows = Annotated[
    int, typer.Option("--rows", metavar="N", min=2, help="Rows of each update, and unrelated ones, at most.")
]


@library.command()
def add(
    folder: Folder,
    adapter: AdapterPath,
    name: Name = None,
    tags: Tags = None,
    date: Date = None,
    documents: Documents = None,
    data: Data = None,
    encoder: EncoderName = None,
    base: Base = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Copy an adapter into a library, with keys made of what it was trained on. The folder is made if it is absent."""
    with reporting(as_json) as result:
        words = _checked(name, date, tags)
        from dynlora_cli.commands import library as command
        from dynlora_cli.commands import preflight
        from dynlora_cli.library.addition import Addition

        wanted = Addition(adapter, name, date, words, data, documents, encoder, base, trust_remote_code)
        command.refuse_early(folder, wanted)
        preflight.adapters([adapter], base)
        from dynlora_cli.cli.views.library import LibraryView

        view = LibraryView(console())
        result.update(command.add(folder, wanted, view.console.line))
        view.show_added(result)
        view.console.show_next([typed("library", "list", str(folder)), typed("library", "calibrate", str(folder))])


@library.command("list")
def list_updates(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is in a library, and whether its files are whole."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.views.library import LibraryView
        from dynlora_cli.commands import library as command

        result.update(command.show(folder))
        view = LibraryView(console())
        view.show_list(result)
        damage = [fault for update in result["updates"] for fault in update["damage"]]
        if damage:
            result["error"] = "\n".join(damage)
            view.console.error(
                UsageError(result["error"], f"bring the files back, or remove the update: {_removal(folder)}")
            )
    if damage:
        raise typer.Exit(UsageError.exit_code)


@library.command()
def remove(folder: Folder, name: Update, as_json: AsJson = False) -> None:
    """Take an update out of a library: its adapter, keys, texts, and what was learned from it."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.views.library import LibraryView
        from dynlora_cli.commands import library as command

        result.update(command.remove(folder, name))
        LibraryView(console()).show_removed(result)


@library.command()
def calibrate(
    folder: Folder,
    unrelated: Unrelated = None,
    false_activation: FalseActivation = "1%",
    at_most: AtMost = 1,
    rows: Rows = 200,
    base: Base = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Learn from held-out rows which update helps on what, and how sure one must be to activate it."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.values import share

        rate = share(false_activation, "--false-activation")
        if not 0 < rate < 1:
            raise UsageError(f"--false-activation {false_activation}: it must be above 0 and below 100 %", "try 1%")
        if unrelated is not None and not unrelated.is_file():
            raise UsageError(f"--unrelated {unrelated} is no file", "paths start at the current folder")
        from dynlora_cli.library.calibration import require
        from dynlora_cli.library.library import Library

        Library.open(folder)
        require()
        from dynlora_cli.cli.views.activation import show_calibration
        from dynlora_cli.commands import library as command
        from dynlora_cli.library.calibrate import Wanted

        view = console()
        wanted = Wanted(unrelated, rate, at_most, rows, base, trust_remote_code)
        summary, learned = command.calibrate(folder, wanted, view.line)
        result.update(summary)
        show_calibration(view, folder, learned, summary["notes"])
        view.show_next([typed("eval", "--library", str(folder), "--explain")])


def _checked(name: str | None, date: str | None, tags: str | None) -> list[str]:
    """The tags; a name, a date or a tag that cannot be is refused.

    Raises:
        UsageError: one cannot.
    """
    from dynlora_cli.library.forms import A_NAME, LONGEST_TAG, is_name

    if name is not None and not is_name(name):
        raise UsageError(
            f"--name {name!r} cannot be the name of an update",
            f"take {A_NAME}; auto, base, library and unrelated are taken",
        )
    if date is not None:
        try:
            known = bool(re.fullmatch(r"\d{4}-\d\d-\d\d", date)) and bool(day.fromisoformat(date))
        except ValueError:
            known = False
        if not known:
            raise UsageError(f"--date {date} is no day", "for example --date 2026-11-29")
    words = list(dict.fromkeys(word.strip() for word in (tags or "").split(",") if word.strip()))
    if long := next((word for word in words if len(word) > LONGEST_TAG), None):
        raise UsageError(f"--tags: {long[:20]}... has more than {LONGEST_TAG} letters", "take shorter words")
    return words


def _removal(folder: Path) -> str:
    return typed("library", "remove", str(folder), "NAME")
