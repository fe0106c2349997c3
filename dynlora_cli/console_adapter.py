"""What a person sees of prune, merge, export and inspect. To stderr, like all that is for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dynlora_cli.console import Console, plain_table, rank_map
from dynlora_cli.report_log import Event
from dynlora_cli.units import change, count, duration, number, percent

BAR = 24  # characters


class AdapterView:
    """A listener of these commands' events, and the tables of what came out."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, event: Event) -> None:
        if event["event"] == "note":
            self.console.note(event["text"])
        elif event["event"] == "point":
            facts = f"{count(event['parameters'])} parameters, {count(event['components'])} components"
            self.console.line(f"held-out loss {number(event['loss'])}  at {facts}")

    def show_pruned(self, summary: dict[str, Any]) -> None:
        """Before and after, loss against size, and what each layer kept."""
        head = Text.assemble(
            ("Pruned", "bold green"),
            (f" to {percent(summary['parameters'] / summary['parameters_start'])} of its parameters", "head"),
            (f"   policy {summary['policy']}, {duration(summary['seconds'])}", "label"),
        )
        parts: list[RenderableType] = [Text(), head, Text(), _before_after(summary)]
        if summary["curve"]:
            measured = summary["curve"][0]["loss"] is not None
            title = "Loss against size" if measured else "Share of the update against size"
            parts += [Text(), Text(title, style="head"), _curve(summary)]
        before = {**dict.fromkeys(summary["ranks"], 0), **summary["ranks_before"]}
        parts += [Text(), rank_map(summary["ranks"], before, self.console.rich.width - 2, 40)]
        parts += [Text(), Text.assemble(("adapter  ", "label"), summary["output_dir"])]
        self.console.show(Group(*parts))


def _before_after(summary: dict[str, Any]) -> RenderableType:
    table = plain_table("", "before", "after", "")
    table.columns[0].style, table.columns[2].style = "label", "head"
    before, after = summary["loss_before"], summary["loss_after"]
    if after is not None:
        table.add_row("held-out loss", number(before), number(after), change(before, after))
    for key in ("parameters", "components"):
        table.add_row(key, count(summary[f"{key}_start"]), count(summary[key]), "")
    table.add_row("update kept", "", percent(summary["energy_kept"]), "of ‖ΔW‖²")
    return table


def _curve(summary: dict[str, Any]) -> RenderableType:
    points: Sequence[dict[str, Any]] = summary["curve"]
    measured = points[0]["loss"] is not None
    heads = ("parameters", "components", "update kept", *(["held-out loss"] if measured else []), "")
    table = plain_table(*heads)
    values = [point["loss"] if measured else point["energy"] for point in points]
    lowest, highest = min(values), max(values)
    for point, value in zip(points, values, strict=True):
        share = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
        chosen = point["parameters"] == summary["parameters"]
        bar = Text("█" * (1 + round((BAR - 1) * share)), style="accent" if chosen else "label")
        if chosen:
            bar.append("  ← this one", style="accent")
        cells = [count(point["parameters"]), count(point["components"]), percent(point["energy"])]
        table.add_row(*cells, *([number(point["loss"])] if measured else []), bar)
    return table
