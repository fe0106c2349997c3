"""What several runs show that train side by side: a line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dynlora_cli.cli.views.console import REFRESHES_PER_SECOND, Console, plain_table
from dynlora_cli.cli.views.progress import Progress, printable
from dynlora_cli.runs.log import Event
from dynlora_cli.text import count, counted, duration, number, short

SHOWN = ("eval", "prune", "refused", "train")  # events that are a line where there is no terminal window


class LanesView:
    """Listener of all runs; a context manager.

    On a terminal one table is redrawn a few times a second. Elsewhere every event that matters is a line, behind the
    name of its run. What one run has noted is not said by the others again.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.progress = {name: Progress() for name in names}
        self.states = dict.fromkeys(names, "waiting")
        self._told: set[str] = set()
        self._live: Live | None = None

    def __enter__(self) -> LanesView:
        self.console.line(f"{counted(len(self.states), 'run')} side by side, on one frozen base")
        if self.console.terminal:
            options: dict[str, Any] = {"redirect_stdout": False, "refresh_per_second": REFRESHES_PER_SECOND}
            self._live = Live(self, console=self.console.rich, **options)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def hear(self, name: str, event: Event) -> None:
        """An event of one of the runs."""
        progress, kind = self.progress[name], event["event"]
        progress.hear(event)
        if kind == "start":
            self.states[name] = "training"
            run = event.get("run") or {}
            self._say(name, f"{count(run.get('train_rows'))} rows, {counted(progress.steps, 'step')}")
            for text in event.get("notes") or ():
                self._note(name, text)
        elif kind in ("note", "warning"):
            self._note(name, event["text"])
        elif kind in SHOWN and self._live is None and (line := progress.line(event)):
            self._say(name, line)

    def ended(self, name: str, found: Mapping[str, Any]) -> None:
        """What has become of a run."""
        self.states[name] = found["state"]
        if found["state"] == "failed":
            self.console.line(Text.assemble((f"{printable(name)}  ", "head"), ("failed: ", "bad"), found["error"]))
        elif found["state"] == "done":
            summary = found["summary"]
            held = f"held out {number(summary.get('loss_after'))}, " if summary.get("loss_after") is not None else ""
            self._say(name, f"done: {held}{count(summary.get('parameters'))} parameters")

    def row_ended(self, name: str, row: Mapping[str, Any]) -> None:
        """The same of a run of a sweep, told by its row."""
        summary = {"loss_after": row.get("measured", {}).get("loss"), "parameters": row.get("parameters")}
        self.ended(name, {**row, "summary": summary})

    def _say(self, name: str, text: str) -> None:
        self.console.line(Text.assemble((f"{printable(name)}  ", "head"), printable(text)))

    def _note(self, name: str, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.console.note(f"{name}: {text}")

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        table = plain_table("run", "step", "loss", "held out", "parameters", "left")
        for name, progress in self.progress.items():
            left = progress.seconds_left
            table.add_row(
                printable(name),
                f"{count(progress.step)}/{count(progress.steps)}" if progress.run else self.states[name],
                number(progress.latest.get("loss")),
                number(progress.held_out),
                short(progress.latest.get("parameters")),
                self.states[name] if self.states[name] != "training" or left is None else duration(left),
            )
        yield table


def show_lanes(console: Console, result: Mapping[str, Any]) -> None:
    """What came out, run by run."""
    table = plain_table("run", "held out before", "after", "parameters", "output")
    for row in result["runs"]:
        found = row.get("summary") or {}
        after = number(found.get("loss_after")) if row["state"] == "done" else row["state"]
        values = [number(found.get("loss_before")), after, count(found.get("parameters")), printable(row["output_dir"])]
        table.add_row(printable(row["name"]), *values)
    console.line()
    console.show(table)
    if result.get("next"):
        console.show_next(result["next"])
