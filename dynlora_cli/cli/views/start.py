"""What a person sees of `dynlora init` and `dynlora doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.progress import printable
from dynlora_cli.text import counted, show


def show_starter(console: Console, summary: dict[str, Any]) -> None:
    """What the rows are, where the recipe is, and what to do with it."""
    for note in summary["notes"]:
        console.note(note)
    if summary["rows"] is None:
        console.note("a hub data set: its columns were not looked at; --dry-run does")
    else:
        console.line(f"{counted(summary['rows'], 'row')}, read as {summary['format']}, for {summary['task']}")
    console.line(Text.assemble("wrote ", (printable(summary["recipe"]), "accent")))
    console.show_next(summary["next"])


KINDS = {"lost": "no equivalent", "differs": "not quite the same", "needless": "needless", "converted": "converted"}


def show_converted(console: Console, summary: dict[str, Any]) -> None:
    """What became of each key of another tool's file: losses first, and all of what is converted at the end."""
    console.line(printable(summary["summary"]))
    for kind, title in KINDS.items():
        found = [key for key in summary["keys"] if key["kind"] == kind]
        if not found:
            continue
        console.line()
        console.line(Text(title, style="bad" if kind == "lost" else "head"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for key in found:
            line = f"line {key['line']}" if key["line"] else "default"
            grid.add_row(Text(f"  {line}", style="label"), Text(printable(key["key"])), Text(printable(key["text"])))
        console.show(grid)
    if summary["unasked"]:
        console.line()
        console.line(Text("set as the tool does without being asked", style="head"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for key in summary["unasked"]:
            grid.add_row(Text(printable(f"  {key['key']}: {show(key['value'])}")), Text(printable(key["text"])))
        console.show(grid)
    console.line()
    console.line(Text.assemble("wrote ", (printable(summary["recipe"]), "accent")))
    console.show_next(summary["next"])


def show_findings(console: Console, findings: Sequence[dict[str, Any]]) -> None:
    """Each finding with a mark; faults once more below, with what mends them."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    part = None
    for finding in findings:
        if finding["part"] != part:
            part = finding["part"]
            grid.add_row(Text(part, style="head"))
        fault = finding["fault"]
        mark = Text("  x" if fault else "  ·" if finding["hint"] else "  ok", style="bad" if fault else "good")
        grid.add_row(mark, Text(printable(finding["name"])), Text(printable(finding["found"])))
    console.show(grid)
    faults = [finding for finding in findings if finding["fault"]]
    for finding in faults:
        console.line(Text.assemble(("fault: ", "bold red"), printable(f"{finding['name']}: {finding['fault']}")))
        console.line(Text.assemble((" hint: ", "accent"), printable(finding["hint"])))
    if not faults:
        console.line(Text("no faults", style="good"))
