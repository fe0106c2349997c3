"""What a person sees of a library. To stderr, like all that is for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.text import Text

from dynlora_cli.cli.views.console import Console, pairs, plain_table
from dynlora_cli.cli.views.progress import printable
from dynlora_cli.text import count, counted, number, size


class LibraryView:
    """The tables of `dynlora library`."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show_added(self, result: dict[str, Any]) -> None:
        """The new update."""
        update = result["update"]
        rows = [
            ("date", update["date"]),
            ("keys", f"{count(update['keys'])} texts that find it"),
            ("held out", f"{counted(update['held_out'], 'row')} to calibrate with"),
            ("size", size(update["bytes"])),
        ]
        if update["tags"]:
            rows.insert(1, ("tags", ", ".join(update["tags"])))
        head = Text.assemble(
            ("Added", "bold green"),
            (f" {printable(update['name'])}", "head"),
            (f" to {printable(result['library'])}", "head"),
        )
        self.console.show(Group(Text(), head, Text(), pairs(rows), Text()))
        self._notes(result)

    def show_list(self, result: dict[str, Any]) -> None:
        """One line for each update."""
        base, encoder = result["base"], result["encoder"]
        if not result["updates"]:
            self.console.line(f"{result['library']} is empty")
            self._notes(result)
            return
        state = "calibrated" if result["calibrated"] else "not calibrated"
        of = f"base {base['name']}, encoder {encoder['name']}, {state}"
        table = plain_table("update", "date", "keys", "size", "loss before", "after", "", "")
        for update in result["updates"]:
            silent = result["calibrated"] and not update["calibrated"]  # without a calibration the nearest answers
            state = "damaged" if update["damage"] else "off until calibrated again" if silent else ""
            card = update["card"]
            numbers = (
                count(update["keys"]),
                size(update["bytes"]),
                number(card["loss_before"]),
                number(card["loss_after"]),
            )
            style = "bad" if update["damage"] else "label"
            table.add_row(
                printable(update["name"]),
                update["date"],
                *numbers,
                Text(state, style=style),
                Text(printable(", ".join(update["tags"])), style="label"),
            )
        table.columns[-1].no_wrap = False  # tags take a second line before anything else is cut
        self.console.show(
            Group(Text(printable(result["library"]), style="head"), Text(printable(of), style="label"), Text(), table)
        )
        self._notes(result)

    def show_removed(self, result: dict[str, Any]) -> None:
        """What is gone, and what is left."""
        left = f"{counted(len(result['left']), 'update')} left" if result["left"] else "the library is empty"
        self.console.line(
            Text.assemble(
                ("Removed", "bold green"),
                (f" {printable(result['removed'])}", "head"),
                (f", {size(result['bytes'])}; {left}", "label"),
            )
        )
        self._notes(result)

    def _notes(self, result: dict[str, Any]) -> None:
        for note in result["notes"]:
            self.console.note(note)
