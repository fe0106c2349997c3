"""What `train --sweep` shows: a line for each run as it ends, the picture of the one that trains, and a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.console import Console, TrainView, pairs, plain_table
from dynlora_cli.cli.views.progress import joined, printable
from dynlora_cli.config.sweep import Grid
from dynlora_cli.runs.log import Event
from dynlora_cli.runs.report.sweep import AGAINST, cells, heads, said, sentences
from dynlora_cli.text import count, counted, duration, number, size


class SweepView:
    """Listener of a sweep: of its runs, each with a `TrainView`, and of what begins and ends; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._train: TrainView | None = None
        self._told: set[str] = set()  # what the first run has said is not said by all others again
        self._began = 0.0
        self._seconds: list[float] = []  # of runs that were trained to their end

    def __enter__(self) -> SweepView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "sweep-run":
            self._begin(event)
        elif kind == "sweep-row":
            self._row(event)
        elif kind == "note" and (self._train is None or event["text"] not in self._told):
            self._told.add(event["text"])
            if not event["text"].endswith("nothing to do"):  # of a run that was done before, which its line says
                self.console.note(event["text"])
        elif kind == "start":
            self._start(event)
        elif kind != "note" and self._train is not None:
            self._train(event)

    def _begin(self, event: Event) -> None:
        self._began = time.monotonic()
        if event["standing"] == "finished":
            return
        left = (event["of"] - event["number"] + 1) * sum(self._seconds) / max(1, len(self._seconds))
        facts = joined(said(event["row"]["values"]), f"about {duration(left)} left" if left else "")
        self.console.line()
        self.console.line(
            Text.assemble((f"run {event['number']} of {event['of']}  ", "head"), (printable(facts), "label"))
        )
        self._train = self.console.train_view()
        self._train.__enter__()

    def _start(self, event: Event) -> None:
        """The first run is shown whole, of the others the picture alone."""
        if self._train is None:
            return
        new = [text for text in event.get("notes") or () if text not in self._told]
        if not self._told:
            self._told.add("the first run")
            self._train(event)
        else:
            for text in new:
                self.console.note(text)
            self._train.begin(event)
        self._told.update(new)

    def _row(self, event: Event) -> None:
        """What has become of a run, in one line."""
        self._end(None, None, None)
        row = event["row"]
        lead = f"{event['number']:>{len(str(event['of']))}}/{event['of']}  {said(row['values'])}"
        if row["state"] == "failed":
            self.console.line(
                Text.assemble((f"{printable(lead)}  ", "head"), ("failed: ", "bad"), printable(row["error"]))
            )
            return
        finished = event["standing"] == "finished"
        if not finished:
            self._seconds.append(time.monotonic() - self._began)
        facts = joined(
            f"held out {number(row['measured'].get('loss'))}",
            f"{count(row.get('parameters'))} parameters",
            "done before" if finished else duration(row.get("seconds")),
        )
        self.console.line(Text.assemble((f"{printable(lead)}  ", "head"), facts))

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._train is not None:
            view, self._train = self._train, None
            view.__exit__(kind, error, trace)


def show_sweep(console: Console, result: Mapping[str, Any]) -> None:
    """What came out: the combinations with their means and intervals, the best marked, and where it all is."""
    console.line()
    console.show(_table(result["combinations"], console.rich.width))
    console.line()
    for line in sentences(result):
        console.show(Text(printable(line), style="label"))
    console.line(Text.assemble(("output   ", "label"), printable(result["output_dir"])))
    if result.get("next"):
        console.show_next(result["next"])


def _table(combinations: Sequence[Mapping[str, Any]], width: int) -> Table:
    """The table of combinations, without what a narrow window has no room for."""
    titles = heads(combinations, list(combinations[0]["values"]))
    lines = [[printable(cell) for cell in cells(one, combinations)] for one in combinations]
    wide = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    kept = list(range(len(titles)))
    for least in ("time", "runs", *reversed(titles[titles.index(AGAINST) : -1])):
        if sum(wide[at] + 3 for at in kept) - 3 > width:
            kept.remove(titles.index(least))
    table = plain_table(*(titles[at] for at in kept))
    for line, one in zip(lines, combinations, strict=True):
        table.add_row(*(line[at] for at in kept), style="good" if one["best"] else None)
    return table


def show_sweep_plan(console: Console, grid: Grid, plans: Mapping[str, Mapping[str, Any]]) -> None:
    """What `--dry-run` found: the runs in their order, and the size of each combination."""
    console.show(pairs([("runs", f"{len(grid.members)}, one after the other"), ("output", f"{grid.folder}/NAME")]))
    table = plain_table("name", *(axis.key for axis in grid.axes), "budget", "steps", "memory")
    for member in grid.members:
        plan = plans.get(member.name) or {}
        budget = count((plan.get("parameters") or {}).get("budget")) if plan else ""
        need = size(plan["memory"]["total"]) if plan.get("memory") else ""
        values = [printable(said({"": value})[1:]) for value in member.values.values()]
        table.add_row(member.name, *values, budget, count(plan["steps"]) if plan else "", need)
    console.show(Group(Text(), table, Text()))
    told = list(dict.fromkeys(text for plan in plans.values() for text in plan.get("notes") or ()))
    for text in told:
        console.note(text)
    console.line(f"{counted(len(grid.members), 'run')}; runs that differ by their seed alone are planned once")
