"""text.md, from the lines of text.jsonl; what is said beside the tables is in text_reading.md.

A task's number is the mean over the target tokens of its 48 test rows, in nats; the table's is the mean over tasks, with
its standard error over tasks. Right: the share of rows whose whole answer greedy decoding gives. Seeds are averaged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from text_tasks import HELD_OUT, seen

Record = dict[str, Any]
READING = Path(__file__).with_name("text_reading.md")
CONDITIONS = ("own", "seen", "kept back", "shuffled", "random")


class Cell(NamedTuple):
    """A method under a condition on some tasks."""

    loss: float
    error: float
    right: float

    def __str__(self) -> str:
        return f"{self.loss:.2f} ± {self.error:.2f} | {100 * self.right:.0f} %"


def by_task(lines: Sequence[Record], method: str, condition: str) -> dict[str, tuple[float, float]]:
    """Loss and share of right answers of each task, over the seeds of a method; empty where it was not measured."""
    found = [line["tasks"] for line in lines if (line["method"], line["condition"]) == (method, condition)]
    return {
        task: (
            mean(each[task][0] / each[task][1] for each in found),
            mean(each[task][2] / each[task][3] for each in found),
        )
        for task in (found[0] if found else ())
    }


def cell(lines: Sequence[Record], method: str, condition: str, names: Sequence[str]) -> Cell | None:
    found = by_task(lines, method, condition)
    if not all(name in found for name in names):
        return None
    losses = [found[name][0] for name in names]
    return Cell(mean(losses), stdev(losses) / len(losses) ** 0.5, mean(found[name][1] for name in names))


def difference(
    lines: Sequence[Record], a: tuple[str, str], b: tuple[str, str], names: Sequence[str]
) -> tuple[float, float]:
    """Mean loss of a less that of b over tasks, and its standard error: of (method, condition) pairs, task by task."""
    first, second = by_task(lines, *a), by_task(lines, *b)
    found = [first[name][0] - second[name][0] for name in names]
    return mean(found), stdev(found) / len(found) ** 0.5


def methods(lines: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(line["method"] for line in lines))


def of(lines: Sequence[Record], method: str) -> list[Record]:
    return [line for line in lines if line["method"] == method]


def main_table(lines: Sequence[Record]) -> list[str]:
    """Every method as it is meant to be used: its own training, or descriptions that were kept back."""
    rows = [
        "| method | trained numbers | seeds | kept-back descriptions of 41 seen tasks: loss | right | 8 held-out tasks: loss | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods(lines):
        measured = {line["condition"] for line in of(lines, method)}
        condition = "kept back" if "kept back" in measured else "own"
        cells = [cell(lines, method, condition, names) for names in (seen(), HELD_OUT)]
        size = max((line.get("parameters", 0) for line in of(lines, method)), default=0)
        seeds = len({line["seed"] for line in of(lines, method) if line["condition"] == condition})
        rows.append(f"| {method} | {f'{size:,}' if size else '-'} | {seeds} | {cells[0]} | {cells[1]} |")
    return rows


def controls(lines: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Loss by what a method was told."""
    rows = [
        "| method | seen descriptions | kept back | another task's | random | another's less its own |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods(lines):
        cells = [cell(lines, method, condition, names) for condition in CONDITIONS[1:]]
        if cells[1] and cells[2]:
            less, error = difference(lines, (method, "shuffled"), (method, "kept back"), names)
            texts = [f"{c.loss:.2f} ({100 * c.right:.0f} %)" if c else "" for c in cells]
            rows.append(f"| {method} | {' | '.join(texts)} | {less:+.2f} ± {error:.2f} |")
    return rows


def task_table(lines: Sequence[Record], names: Sequence[str], chosen: Sequence[tuple[str, str]]) -> list[str]:
    """Loss and right answers of single tasks; `chosen` are (method, condition)."""
    rows = [f"| task | {' | '.join(method for method, _ in chosen)} |", "|---" * (len(chosen) + 1) + "|"]
    found = [by_task(lines, *each) for each in chosen]
    for name in names:
        texts = [f"{each[name][0]:.2f} ({100 * each[name][1]:.0f} %)" if each else "" for each in found]
        rows.append(f"| {name} | {' | '.join(texts)} |")
    return rows


def costs(lines: Sequence[Record]) -> list[str]:
    rows = [
        "| method | rate | trained numbers | CPU seconds of training | an adapter for a description: numbers | kB | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods(lines):
        best = next((line for line in of(lines, method) if "cpu" in line), None)
        if best:
            made = [f"{best[key]:,}" if key in best else "-" for key in ("written", "kb", "ms")]
            rows.append(
                f"| {method} | {best['rate']:g} | {best['parameters']:,} | {best['cpu']:,.0f} | {' | '.join(made)} |"
            )
    return rows


def page(lines: Sequence[Record]) -> str:
    """The whole of text.md."""
    shown = [("base", "own"), ("LoRA by task", "own")]
    shown += [(m, "kept back") for m in methods(lines) if of(lines, m)[0]["condition"] != "own" and "base" not in m]
    parts = [
        "# Adapters from descriptions: 49 text tasks on stories3M",
        READING.read_text(encoding="utf-8").strip() if READING.exists() else "",
        "## As each is meant to be used",
        "\n".join(main_table(lines)),
        "## What the description does: 41 seen tasks, loss (right answers)",
        "\n".join(controls(lines, seen())),
        "## The same on the 8 held-out tasks",
        "\n".join(controls(lines, HELD_OUT)),
        "## The held-out tasks one by one",
        "\n".join(task_table(lines, HELD_OUT, shown)),
        "## Sizes and seconds",
        "\n".join(costs(lines)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
