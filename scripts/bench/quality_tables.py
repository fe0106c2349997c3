"""RESULTS.md and its pictures, from the lines of quality.jsonl.

A cell's runs are those with its chosen learning rate: the one with the lowest `val` loss on seed 0. Tables show the loss
on the `test` part. Differences are paired by seed: same task, budget, seed, batches and order. They are 100 times the
logarithm of the ratio of the losses, which is percent where it is small, and zero in the mean for two equal methods, as
a mean of ratios is not. The 95 % interval is a bootstrap over tasks and, inside a task, over seeds, since runs of one
task are not independent of each other. Language models also have an interval of their own: a classifier that is nearly
always right has losses that differ severalfold between seeds.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from quality_tasks import TASKS, base_name

CONTEST = ("lora", "rslora", "dora", "adalora", "eva", "dynlora")  # who gets a mean rank
LANGUAGE = "language models alone"
Record = dict[str, Any]
Cell = tuple[str, str, int]  # task, method, budget
Duel = tuple[str, tuple[str, int], tuple[str, int]]  # title, then method and budget of ours and of theirs
SAMPLES = 10_000
WIDTH, HEIGHT, MARGIN = 640, 380, 56
COLOURS = ["#1b6ef3", "#d6336c", "#2b8a3e", "#e8590c", "#7048e8", "#0c8599", "#868e96", "#495057"]


@dataclass
class Chosen:
    """A cell at its chosen rate: the rate, and its runs by seed."""

    rate: float
    runs: dict[int, Record]

    def mean(self, key: str) -> float:
        return mean(run[key] for run in self.runs.values())


def choose(records: Iterable[Record]) -> dict[Cell, Chosen]:
    """Every cell at the rate with the lowest held-out loss on seed 0."""
    by_rate: dict[Cell, dict[float, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        by_rate[record["task"], record["method"], record["budget"]][record["rate"]][record["seed"]] = record
    chosen = {}
    for cell, rates in by_rate.items():
        tried = {rate: runs for rate, runs in rates.items() if 0 in runs}
        rate = min(tried, key=lambda rate: (tried[rate][0]["loss"], rate))
        if math.isfinite(tried[rate][0]["loss"]):
            chosen[cell] = Chosen(rate, tried[rate])
    return chosen


def paired(
    cells: dict[Cell, Chosen], tasks: Sequence[str], ours: tuple[str, int], theirs: tuple[str, int], key: str
) -> dict[str, list[float]]:
    """Differences in percent (see above), by task, one for each seed that both have.

    Args:
        ours, theirs: method and budget.
        key: "loss" or "test".
    """
    found = {}
    for task in tasks:
        one, other = cells.get((task, *ours)), cells.get((task, *theirs))
        if one and other:
            seeds = one.runs.keys() & other.runs.keys()
            found[task] = [100 * math.log(one.runs[s][key] / other.runs[s][key]) for s in sorted(seeds)]
    return found


def interval(differences: dict[str, list[float]]) -> tuple[float, float, float]:
    """Mean over tasks of the means over seeds, and a 95 % bootstrap interval over both."""
    draw, groups = random.Random(0), list(differences.values())
    means = sorted(
        mean(mean(draw.choices(group, k=len(group))) for group in draw.choices(groups, k=len(groups)))
        for _ in range(SAMPLES)
    )
    return mean(map(mean, groups)), means[int(0.025 * SAMPLES)], means[int(0.975 * SAMPLES)]


def mean_ranks(
    cells: dict[Cell, Chosen], tasks: Sequence[str], methods: Sequence[str], budget: int, key: str
) -> dict[str, float]:
    """Place of each method by its mean loss, averaged over the tasks that all of them have."""
    places: dict[str, list[int]] = defaultdict(list)
    for task in tasks:
        if all((task, method, budget) in cells for method in methods):
            order = sorted(methods, key=lambda method: cells[task, method, budget].mean(key))
            for method in methods:
                places[method].append(1 + order.index(method))
    return {method: mean(found) for method, found in places.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def budget_table(cells: dict[Cell, Chosen], tasks: Sequence[str], methods: Sequence[str], budget: int, key: str) -> str:
    """Mean loss by task and method, mean rank in the contest, and the paired difference to LoRA."""
    tasks = [task for task in tasks if (task, "lora", budget) in cells]
    ranked = [m for m in CONTEST if tasks and all((t, m, budget) in cells for t in tasks)]
    ranks = mean_ranks(cells, tasks, ranked, budget, key)
    rows = []
    for method in methods:
        found = {task: cells[task, method, budget] for task in tasks if (task, method, budget) in cells}
        if not found:
            continue
        size = mean(c.mean("parameters") / cells[t, "lora", budget].mean("parameters") for t, c in found.items())
        losses = [f"{found[task].mean(key):.4f} ({len(found[task].runs)})" if task in found else "" for task in tasks]
        place = f"{ranks[method]:.2f}" if method in ranks else ""
        against = paired(cells, tasks, (method, budget), ("lora", budget), key)
        difference = ["", ""] if method == "lora" else intervals(against)
        rows.append([f"`{method}`", *losses, f"{size:.2f}x", place, *difference])
    return table(["method", *tasks, "parameters", "mean rank", "difference to LoRA, 95 % interval", LANGUAGE], rows)


def duel_table(cells: dict[Cell, Chosen], tasks: Sequence[str], duels: Sequence[Duel]) -> str:
    """One line a duel: paired differences by task and over all of them; below zero ours is better."""
    rows = []
    for title, ours, theirs in duels:
        found = paired(cells, tasks, ours, theirs, "test")
        if found:
            by_task = [f"{mean(found[task]):+.2f}" if task in found else "" for task in tasks]
            better = sum(mean(group) < 0 for group in found.values())
            size = mean(cells[(t, *ours)].mean("parameters") / cells[(t, *theirs)].mean("parameters") for t in found)
            rows.append([title, *by_task, f"{size:.2f}x", f"{better} of {len(found)}", *intervals(found)])
    return table(["ours against", *tasks, "ours has", "better on", "mean, 95 % interval", LANGUAGE], rows)


def is_classifier(task: str) -> bool:
    known = TASKS.get(base_name(task))
    return known is not None and known.classify


def intervals(differences: dict[str, list[float]]) -> list[str]:
    """Of all tasks, and of those that are no classifiers."""
    language = {task: group for task, group in differences.items() if not is_classifier(task)}
    return [
        "{:+.2f} % ({:+.2f} to {:+.2f})".format(*interval(part)) if part else "" for part in (differences, language)
    ]


def curve_table(cells: dict[Cell, Chosen], tasks: Sequence[str], ranks: Sequence[int]) -> str:
    """LoRA's held-out loss by rank: where it falls no further, no allocation of rank can win."""
    rows = []
    for task in tasks:
        found = [cells.get((task, "lora", rank)) for rank in ranks]
        if sum(cell is not None for cell in found) > 1:
            rows.append([task, *(f"{c.mean('loss'):.4f} ({c.rate:.0e}, {len(c.runs)})" if c else "" for c in found)])
    return table(["task", *(f"rank {rank}" for rank in ranks)], rows)


def auto_table(cells: dict[Cell, Chosen], tasks: Sequence[str], ranks: Sequence[int]) -> str:
    """One run that finds its rank, against LoRA at every rank with its rate chosen by hand; seed 0."""
    rows = []
    for task in tasks:
        auto = cells.get((task, "dynlora-auto", 32))
        sweep = {rank: cells[task, "lora", rank] for rank in ranks if (task, "lora", rank) in cells}
        if not auto or not sweep:
            continue
        top = min((cell.runs[0] for cell in sweep.values()), key=lambda run: run["loss"])
        best, run = top["loss"], auto.runs[0]
        limit = best + max(0.01 * best, top.get("loss_error", run["loss_error"]))
        least = min(rank for rank, cell in sweep.items() if cell.runs[0]["loss"] <= limit)
        found = run["parameters"] / (sweep[least].runs[0]["parameters"] / least)
        rows.append(
            [
                task,
                f"{best:.4f}",
                f"{limit:.4f}",
                str(least),
                f"{found:.1f}",
                f"{run['loss']:.4f}",
                f"{run['rate_used']:.0e}",
                "yes" if run["loss"] <= limit and found <= 2 * least else "no",
            ]
        )
    head = [
        "task",
        "best of the sweep",
        "with 1 % or its error",
        "least rank within",
        "rank found",
        "loss",
        "rate found",
    ]
    return table([*head, "both within"], rows)


def rate_table(cells: dict[Cell, Chosen], tasks: Sequence[str], budgets: Sequence[int]) -> str:
    """The rate found by short trials, against the same method with its rate chosen by whole runs; seed 0."""
    rows = []
    for budget, task in ((budget, task) for budget in budgets for task in tasks):
        found, tuned = cells.get((task, "dynlora-auto-rate", budget)), cells.get((task, "dynlora", budget))
        if not found or not tuned:
            continue
        run, best = found.runs[0], tuned.runs[0]
        limit = best["loss"] + max(0.01 * best["loss"], best["loss_error"])
        difference = 100 * math.log(run["loss"] / best["loss"])
        losses = [f"{tuned.rate:.0e}", f"{best['loss']:.4f}", f"{run['rate_used']:.0e}", f"{run['loss']:.4f}"]
        within = "yes" if run["loss"] <= limit else "no"
        rows.append([task, str(budget), *losses, f"{difference:+.1f} %", f"{limit:.4f}", within])
    head = [
        "task",
        "rank",
        "best rate",
        "its loss",
        "rate found",
        "its loss",
        "difference",
        "1 % or its error",
        "within",
    ]
    return table(head, rows)


def results(records: list[Record], design: Sequence[str], final: Sequence[str], methods: Sequence[str]) -> str:
    """RESULTS.md: everything that the lines of quality.jsonl say."""
    cells, ranks, budgets = choose(records), (1, 2, 4, 8, 16, 32), (1, 2, 4)
    others = sorted({method for _, method, _ in cells} - set(methods))
    seconds = sum(record.get("wall", 0) for record in records)
    parts = [
        "# Quality: what a rank that follows the data is worth\n",
        f"Made by `scripts/bench/quality.py table` from quality.jsonl: {len(records)} runs, {seconds / 3600:.1f} CPU hours. "
        "What is measured and how: quality.py, quality_tasks.py, quality_methods.py. In brackets: seeds.\n",
        "## Where rank matters\n\nLoRA (stock PEFT) by rank, `val` loss (best rate, seeds). Where it falls no further, no "
        "method can win.\n",
        curve_table(cells, [*design, *final], ranks),
        "## One run that finds its rank\n\n`rank.budget: auto` and `train.learning_rate: auto` against the sweep above, "
        "`val` loss, seed 0.\n",
        auto_table(cells, [*design, *final], ranks),
        "## A learning rate found by short trials\n\n`train.learning_rate: auto` against the best of whole runs, `val` loss, "
        "seed 0.\n",
        rate_table(cells, [*design, *final], budgets),
    ]
    for title, tasks, key in (
        ("Design tasks (`val` loss; the algorithm was chosen on them)", design, "loss"),
        ("Final tasks (`test` loss)", final, "test"),
    ):
        parts.append(f"## {title}\n")
        for budget in budgets:
            if any((task, "lora", budget) in cells for task in tasks):
                parts.append(f"Average rank {budget}:\n")
                parts.append(budget_table(cells, tasks, [*methods, *others], budget, key))
    parts += [
        "## Ours against one other at a time (final tasks, `test` loss, percent)\n",
        duel_table(cells, final, duels()),
    ]
    return "\n".join(parts)


def duels() -> list[Duel]:
    """What the project claims, budget by budget."""
    found: list[Duel] = []
    for budget in (1, 2, 4):
        ours, at = ("dynlora", budget), f"at {budget}"
        found += [
            (f"LoRA, {at}", ours, ("lora", budget)),
            (f"LoRA of twice the size, {at}", ours, ("lora", 2 * budget)),
            (f"DoRA, ours of its size, {at}", ("dynlora-dora-size", budget), ("dora", budget)),
            (f"LoRA of 4x, then compressed by PEFT, {at}", ours, ("lora-4x-cut", budget)),
            (f"components removed at random, {at}", ours, ("dynlora pruning.policy=random", budget)),
            (f"the ranks found, shuffled, {at}", ours, ("dynlora-map-shuffled", budget)),
            (f"the ranks found, from the start, {at}", ours, ("dynlora-map", budget)),
        ]
    return found


def pareto_svg(cells: dict[Cell, Chosen], tasks: Sequence[str], methods: Sequence[str], budgets: Sequence[int]) -> str:
    """Loss over final parameters, both relative to LoRA of rank 1, in the mean over tasks; empty before there is a line to draw."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for method in methods:
        points = []
        for budget in budgets:
            pairs = [
                (cells[t, method, budget], cells[t, "lora", 1])
                for t in tasks
                if (t, method, budget) in cells and (t, "lora", 1) in cells
            ]
            if len(pairs) == len(tasks):
                x = mean(a.mean("parameters") / b.mean("parameters") for a, b in pairs)
                y = mean(a.mean("test") / b.mean("test") for a, b in pairs)
                points.append((x, 100 * y))
        if points:
            lines[method] = points
    if max(map(len, lines.values()), default=0) < 2:
        return ""
    return draw(lines, "final parameters, relative to LoRA of rank 1", "held-out loss, % of LoRA of rank 1")


def draw(lines: dict[str, list[tuple[float, float]]], x_title: str, y_title: str, unit: str = "x") -> str:
    """A line chart as SVG; x is logarithmic to base 2, and `unit` stands behind its numbers."""
    xs = [math.log2(x) for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    left, right, low, high = min(xs) - 0.1, max(xs) + 0.1, min(ys) - 0.5, max(ys) + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + (math.log2(x) - left) / (right - left) * (WIDTH - 2 * MARGIN - 90),
            HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 6))):
        _, y = place(2**left, tick)
        parts.append(
            f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN - 90}" stroke="#e9ecef"/><text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for power in range(math.ceil(left), math.floor(right) + 1):
        x, _ = place(2.0**power, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{2.0**power:g}{unit}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour, places = COLOURS[number % len(COLOURS)], [place(*point) for point in sorted(points)]
        width = 3 if name == "dynlora" else 1.5
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1}" fill="{colour}"/>' for x, y in places]
        y = MARGIN + 18 * number
        parts.append(f'<text x="{WIDTH - MARGIN - 78}" y="{y}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{(WIDTH - 90) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{x_title}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{y_title}</text></svg>'
    )
    return "\n".join(parts) + "\n"
