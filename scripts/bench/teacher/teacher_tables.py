"""teacher.md, from the lines of teacher.jsonl.

Rates are chosen on `val`, seed 0 (quality_tables.choose). A teacher's cost is the CPU seconds of its run with the
teacher's passes (and with the teacher's own run, where it has one), over those of the same run without them. "At equal
cost" compares with a run without a teacher that is longer by that factor: its loss is read off between the two nearest
lengths that were run, linear in the logarithms of loss and steps, seed by seed. Differences are 100 times the logarithm
of the ratio; below 0 the teacher wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import mean, stdev
from typing import Any

from quality_tables import Cell, Chosen, choose, table
from quality_tasks import base_name, find_task

Record = dict[str, Any]
HEAD = [
    "task",
    "steps",
    "rank",
    "method",
    "rate",
    "`val`",
    "`test`",
    "teacher's `val`",
    "seeds",
    "cost",
    "to ours without, equal steps",
    "to ours without, equal cost",
    "to LoRA, equal cost",
]


def missing(records: list[Record], measured: Iterable[Record]) -> list[Record]:
    """Runs without a teacher that were measured elsewhere, of our tasks and ranks, and are not there yet.

    Same code, same seed, same loss: they need not be run again.
    """
    wanted = {(base_name(record["task"]), record["budget"]) for record in records}
    names = {"dynlora": "ours", "lora": "lora"}
    known = {_key(record) for record in records}
    others = [
        {**record, "method": names[record["method"]]}
        for record in measured
        if record["method"] in names and (base_name(record["task"]), record["budget"]) in wanted
    ]
    return [record for record in others if _key(record) not in known]


def _key(record: Record) -> tuple[Any, ...]:
    return (record["task"], record["method"], record["budget"], f"{record['rate']:.3e}", record["seed"])


def untaught(method: str) -> str:
    """Ours without a teacher and with the usual schedule, on the same rows and from the same start."""
    name, *settings = method.split()
    kept = [each for each in settings if each.startswith("rows=")]
    if "kind=heal" in settings:
        kept = [each for each in settings if not each.startswith("k=")]
    return " ".join(["ours" if name == "flat" else name, *kept])


def cost(run: Record) -> float:
    """CPU seconds with the teacher over those without."""
    if "teacher_cpu" not in run:
        return 1.0
    return (run["cpu"] + run.get("before_cpu", 0.0)) / (run["cpu"] - run.get("teacher_cpu", 0.0))


def between(losses: Mapping[int, float], steps: float) -> float | None:
    """The loss of a run of so many steps, from those of other lengths; None where it lies outside of them."""
    low = max((n for n in losses if n <= steps), default=None)
    high = min((n for n in losses if n >= steps), default=None)
    if low is None or high is None:
        return None
    if low == high:
        return losses[low]
    share = math.log(steps / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(losses[low]) + share * math.log(losses[high]))


def curve(cells: Mapping[Cell, Chosen], task: str, method: str, budget: int, seed: int, key: str) -> dict[int, float]:
    """Loss by number of steps, of one seed."""
    return {
        find_task(name).steps: cell.runs[seed][key]
        for (name, other, size), cell in cells.items()
        if (base_name(name), other, size) == (base_name(task), method, budget) and seed in cell.runs
    }


def against(cells: Mapping[Cell, Chosen], cell: Cell, rival: str, key: str, *, longer: bool) -> list[float]:
    """Differences in percent, one for each seed, to the rival of the same length, or of the same cost."""
    task, _, budget = cell
    found = []
    for seed, run in sorted(cells[cell].runs.items()):
        steps = find_task(task).steps * (cost(run) if longer else 1.0)
        other = between(curve(cells, task, rival, budget, seed, key), steps)
        if other is not None:
            found.append(100 * math.log(run[key] / other))
    return found


def teacher_loss(chosen: Chosen) -> str:
    """The mean held-out loss of the teachers, where it was measured."""
    found = [run["teacher_loss"] for run in chosen.runs.values() if "teacher_loss" in run]
    return f"{mean(found):.4f}" if found else ""


def told(differences: list[float]) -> str:
    if not differences:
        return ""
    spread = f" ± {stdev(differences):.1f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.1f}{spread} %"


def lines(records: Iterable[Record], key: str) -> list[list[str]]:
    cells = choose(records)

    def place(cell: Cell) -> tuple[str, int, int, bool, str]:
        task, method, budget = cell
        return base_name(task), find_task(task).steps, budget, "k=" in method, method

    found = []
    for cell in sorted(cells, key=place):
        chosen, (task, method, budget) = cells[cell], cell
        taught, rival = "k=" in method, untaught(method)
        others = [
            against(cells, cell, rival, key, longer=False) if method != rival else [],
            against(cells, cell, rival, key, longer=True) if taught else [],
            against(cells, cell, "lora", key, longer=True) if "=" not in rival and method != "lora" else [],
        ]
        found.append(
            [
                base_name(task),
                str(find_task(task).steps),
                str(budget),
                f"`{method}`",
                f"{chosen.rate:.1e}",
                f"{chosen.mean('loss'):.4f}",
                f"{chosen.mean('test'):.4f}",
                teacher_loss(chosen),
                str(len(chosen.runs)),
                f"{mean(map(cost, chosen.runs.values())):.2f}",
                *map(told, others),
            ]
        )
    return found


def results(records: list[Record]) -> str:
    """teacher.md."""
    head = (
        "# A teacher from the run itself\n\nMade by `python scripts/bench/teacher/teacher.py table` from teacher.jsonl: "
        f"{len(records)} runs. What the columns mean: teacher_tables.py; the methods: teacher_methods.py.\n"
    )
    part = "Differences are of `{}` losses, mean and standard deviation over seeds.\n"
    return "\n".join([head, part.format("val"), table(HEAD, lines(records, "loss"))])
