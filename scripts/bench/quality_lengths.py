"""quality_long.md: the same cells at several lengths of the run, from quality_long.jsonl and quality.jsonl.

A line is a task, a number of steps, a budget and a method. Cells, rates and paired differences are those of
quality_tables.py; runs of the usual length come from quality.jsonl, for the tasks, budgets and methods that have a longer run.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

from quality_tables import Cell, Chosen, choose, interval, paired, table
from quality_tasks import base_name, find_task

Record = dict[str, Any]


def page(longer: Iterable[Record], usual: Iterable[Record]) -> str:
    """The whole of quality_long.md."""
    longer = list(longer)
    cells = choose(longer)
    wanted = {(base_name(task), method, budget) for task, method, budget in cells}
    cells |= {cell: chosen for cell, chosen in choose(usual).items() if cell in wanted}
    hours = sum(record.get("cpu", 0) for record in longer) / 3600
    return "\n".join(
        [
            "# Longer runs: does the lead hold?\n",
            f"Made by `scripts/bench/quality.py table --results scripts/bench/quality_long.jsonl`: {len(longer)} runs, "
            f"{hours:.1f} CPU hours, and those of 200 steps from quality.jsonl. Rates are chosen at each length by the `val` loss "
            "of seed 0. Differences are percent of LoRA's loss with the same steps and budget, paired by seed; in brackets the "
            "lowest and the highest seed.\n",
            "## In the mean over tasks\n\nThe difference to LoRA (`test`; 95 % interval over tasks and seeds).\n",
            summary_table(cells),
            "## Every cell\n",
            cell_table(cells),
        ]
    )


def summary_table(cells: dict[Cell, Chosen]) -> str:
    """Methods by length and budget, over the tasks that have both the method and LoRA."""
    lengths = sorted({find_task(task).steps for task, _, _ in cells})
    rows = []
    for method in methods_of(cells):
        for budget in sorted({budget for _, name, budget in cells if name == method}):
            row = [f"`{method}`", str(budget)]
            for steps in lengths:
                tasks = sorted({task for task, _, _ in cells if find_task(task).steps == steps})
                found = paired(cells, tasks, (method, budget), ("lora", budget), "test")
                row.append(
                    "{:+.1f} % ({:+.1f} to {:+.1f}), {n}".format(*interval(found), n=many(found)) if found else ""
                )
            if any(row[2:]):
                rows.append(row)
    return table(["against LoRA", "rank", *(f"{steps} steps" for steps in lengths)], rows)


def many(found: dict[str, list[float]]) -> str:
    runs = sum(map(len, found.values()))
    return f"{len(found)} task{'s' * (len(found) > 1)}, {runs} run{'s' * (runs > 1)}"


def methods_of(cells: dict[Cell, Chosen]) -> list[str]:
    return sorted({method for _, method, _ in cells} - {"lora"}, key=lambda method: (method != "dynlora", method))


def cell_table(cells: dict[Cell, Chosen]) -> str:
    rows = []
    order = sorted(cells, key=lambda c: (base_name(c[0]), c[2], find_task(c[0]).steps, c[1] != "lora", c[1]))
    for task, method, budget in order:
        chosen, lora = cells[task, method, budget], cells.get((task, "lora", budget))
        against, size = "", ""
        if lora and method != "lora":
            (found,) = paired(cells, [task], (method, budget), ("lora", budget), "test").values()
            against = f"{mean(found):+.1f} % ({min(found):+.1f} to {max(found):+.1f}; {len(found)})" if found else ""
            size = f"{chosen.mean('parameters') / lora.mean('parameters'):.3f}x"
        cpu = [run["cpu"] for run in chosen.runs.values() if "cpu" in run]
        losses = [f"{chosen.mean(key):.4f}" for key in ("loss", "test")]
        about = [base_name(task), str(budget), str(find_task(task).steps), f"`{method}`"]
        seeds = [f"{chosen.rate:.1e}", str(len(chosen.runs))]
        rows.append([*about, *seeds, *losses, against, size, f"{mean(cpu):.0f}" if cpu else ""])
    head = [
        "task",
        "rank",
        "steps",
        "method",
        "rate",
        "seeds",
        "val",
        "test",
        "against LoRA, test",
        "parameters",
        "CPU s",
    ]
    return table(head, rows)
