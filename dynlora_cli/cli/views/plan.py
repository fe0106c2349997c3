"""What a person sees of `train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.console import Console, pairs, plain_table
from dynlora_cli.cli.views.progress import module_groups, printable
from dynlora_cli.text import count, number, rate, size


def show_plan(console: Console, plan: dict[str, Any]) -> None:
    """What `--dry-run` found: the recipe, an example, the target modules, parameters and the schedule."""
    recipe = Text(printable(plan.get("recipe_yaml", "")).rstrip())
    recipe.highlight_regex(r"(?m)^\s*(?:- )?[\w.]+:", "accent")
    console.show(Group(Text("Recipe", style="head"), Padding(recipe, (0, 2))))
    if plan.get("example"):
        console.show_example(plan["example"])
    if plan.get("modules"):
        console.show(Group(Text("Target modules", style="head"), _module_table(plan["modules"]), Text()))
    parameters = plan.get("parameters") or {}
    rows = [(f"{key} parameters", count(value)) for key, value in parameters.items()]
    if file := plan.get("file"):
        rows.append(("adapter's file", f"at most {count(file['bytes'])} bytes, in {file['dtype']}"))
    rows.append(("optimizer steps", count(plan.get("steps"))))
    console.show(pairs([*rows, *_memory_rows(plan.get("memory"))]))
    if plan.get("schedule"):
        console.show(Group(Text(), Text("Schedule", style="head"), _schedule_table(plan["schedule"])))
    for note in plan.get("notes") or ():
        console.note(note)


def _module_table(modules: Iterable[dict[str, Any]]) -> Table:
    table = plain_table("module", "layers", "out x in", "components each")
    for (pattern, d_out, d_in, components), layers in module_groups(modules).items():
        table.add_row(printable(pattern), f"x{layers}", f"{d_out} x {d_in}", count(components))
    return table


def _schedule_table(schedule: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("step", "average rank", "parameters", "learning rate", "")
    most = max((row.get("parameters") or 0 for row in schedule), default=0) or 1
    for row in schedule:
        bar = Text("█" * max(1, round(24 * (row.get("parameters") or 0) / most)), style="accent")
        cells = (count(row.get("step")), number(row.get("rank"), 1), count(row.get("parameters")))
        table.add_row(*cells, rate(row.get("learning_rate")), bar)
    return table


def _memory_rows(need: dict[str, int] | None) -> list[tuple[str, str]]:
    if need is None:
        return []
    parts = ", ".join(
        f"{key} {size(need[key])}" for key in ("base", "adapter", "optimizer", "activations", "libraries")
    )
    rows = [
        ("memory", f"about {size(need['total'])} of {size(need['free'])} free: {parts}"),
        ("rows at a time", f"{need['rows']} of up to {need['length']} tokens; {count(need['most_rows'])} would fit"),
    ]
    if need.get("teacher"):
        text = f"{size(need['teacher'])} before the first step, when there are no activations yet"
        rows.append(("teacher's reading", text))
    return rows
