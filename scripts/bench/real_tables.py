"""REAL.md and real.svg, from the lines of real.jsonl.

Losses are nats per token of the answers (of shakespeare: of all tokens) on the `test` part. Against the best of the sweep:
100 times the logarithm of the ratio of the losses, which is percent where it is small. The best of the sweep is the line with
the lowest `val` loss; its cost is that of all of its runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from quality_tables import table
from real_picture import Bar, bars
from real_tasks import LONG, TASKS

MODEL = "SmolLM2-135M-Instruct"  # of lines that name none
SWEEP, NEEDED = (4, 16, 64), (16, 64)
TOOLS = {
    "axolotl": "axolotl",
    "llamafactory": "LLaMA-Factory",
    "ms-swift": "ms-swift",
    "unsloth": "Unsloth Studio",
    "torchtune": "torchtune",
    "trl": "TRL",
    "tinker": "Tinker",
    "tinker-get-lr": "Tinker, its get_lr",
}
OURS = {
    ("dynlora", 0): "dynlora, nothing set",
    ("dynlora train.epochs=1", 0): "dynlora, nothing set but one pass",
    ("dynlora train.epochs=1", 16): "dynlora, budget 16, one pass",
    ("dynlora-auto", 0): "dynlora, budget auto",
}
LONGER = "lora+stretched"
SHORTER = {  # for the picture
    ("dynlora", 0): "dynlora, nothing set",
    ("dynlora train.epochs=1", 0): "dynlora, one pass",
    (LONGER, 0): "the sweep's best, for as long",
}
Record = dict[str, Any]
Method = tuple[str, int]


def write_tables(records: Sequence[Record], folder: Path) -> None:
    """REAL.md, and real.svg where there is a sweep to compare with."""
    (folder / "REAL.md").write_text(page(records), encoding="utf-8")
    if picture := draw(records):
        (folder / "real.svg").write_text(picture, encoding="utf-8")
    else:
        (folder / "real.svg").unlink(missing_ok=True)


def page(records: Sequence[Record]) -> str:
    """All tables."""
    tasks = in_order(records, [*TASKS, *LONG])
    hours = sum(spent(r) for r in records) / 3600
    parts = [
        "# Out of the box, on a real model\n",
        f"Made by `scripts/bench/real.py table` from real.jsonl: {len(records)} runs of {models_of(records)} in bf16, "
        f"{hours:.1f} CPU hours. What is measured and how: real.py, real_tasks.py, real_tools.py, real_methods.py. Every "
        "run sees the same rows once, but dynlora with nothing set chooses how often (2 to 4 times), and stretched runs "
        "take as many CPU seconds as that. CPU seconds are of one thread, with loading; of ours with the search for the "
        "rate. Of dynlora nothing is set but model, dtype and data, and it holds 5 % of the rows out for itself "
        "(`@four`: as many passes as make 1,000 steps, four at most, as it was before).\n",
        "## Against the best of a sweep\n",
        "`test` loss in percent above the best LoRA of a sweep (ranks 16 and 64, on some tasks 4 too, each at its best rate), by `val`; below zero is "
        "better. In brackets: CPU time as a share of the sweep's.\n",
        summary(records, tasks),
    ]
    if unfinished := [task for task in tasks if not finished(records, task)]:
        parts.append(f"The sweep is not finished on: {', '.join(unfinished)}.\n")
    for task in tasks:
        parts += [f"## {task}\n", details(records, task)]
    return "\n".join(parts)


def models_of(records: Sequence[Record]) -> str:
    return ", ".join(sorted({r.get("model", MODEL) for r in records}))


def in_order(records: Sequence[Record], known: Sequence[str]) -> list[str]:
    """The tasks that there are lines of: ours first, then files."""
    there = {r["task"] for r in records}
    return [task for task in known if task in there] + sorted(t for t in there if t.endswith(".jsonl"))


def spent(record: Record) -> float:
    """CPU seconds of a run as whoever makes it has to spend them; of a sweep's also those of the choice."""
    if "cpu_total" in record:
        return float(record["cpu_total"])
    return float(sum(record.get(key, 0.0) for key in ("cpu_load", "cpu_train")))


def sweep(records: Iterable[Record], task: str, ranks: Sequence[int] = SWEEP) -> list[Record]:
    """The runs of stock LoRA at these ranks, seed 0."""
    return [r for r in records if (r["task"], r["method"], r["seed"]) == (task, "lora", 0) and r["rank"] in ranks]


def best_of(lines: Sequence[Record]) -> Record | None:
    """The one with the lowest `val` loss."""
    finite = [line for line in lines if math.isfinite(line["loss"])]
    return min(finite, key=lambda line: line["loss"]) if finite else None


def finished(records: Sequence[Record], task: str) -> bool:
    """Whether the ranks that the sweep needs have their best rates inside their grids; what else was tried counts, too."""
    return all(_inside(sweep(records, task, (rank,))) for rank in NEEDED)


def _inside(lines: Sequence[Record]) -> bool:
    best = best_of(lines)
    return best is not None and min(r["rate"] for r in lines) < best["rate"] < max(r["rate"] for r in lines)


def sweep_cost(records: Sequence[Record], task: str) -> float:
    """CPU seconds of all runs of the sweep, each with the look at `val` by which it is judged."""
    return sum(spent(r) + r.get("cpu_val", 0.0) for r in sweep(records, task))


def levels(records: Sequence[Record], task: str) -> dict[int, float]:
    """The `test` loss of the best of the sweep, by seed; empty where the sweep is not finished."""
    best = best_of(sweep(records, task))
    if best is None or not finished(records, task):
        return {}
    same = [r for r in records if all(r[k] == best[k] for k in ("task", "method", "rank", "rate")) and "test" in r]
    return {r["seed"]: r["test"] for r in same}


def above(runs: Sequence[Record], reference: Mapping[int, float]) -> float:
    """Percent by which their `test` losses are above the reference's, mean over the seeds that both have."""
    return mean(100 * math.log(run["test"] / reference[run["seed"]]) for run in runs if run["seed"] in reference)


def chosen(records: Iterable[Record], task: str) -> dict[Method, list[Record]]:
    """The runs of every method, one a seed; those with a rate to choose at their best one."""
    found: dict[Method, dict[float, dict[int, Record]]] = {}
    for record in records:
        if record["task"] == task and math.isfinite(record["loss"]):
            rank = 0 if record["method"] == LONGER else record["rank"]  # each task's best has a rank of its own
            rates = found.setdefault((record["method"], rank), {})
            rates.setdefault(record["rate"], {})[record["seed"]] = record
    kept = {}
    for method, rates in found.items():
        tried = {rate: runs for rate, runs in rates.items() if 0 in runs}
        if tried:
            best = min(tried, key=lambda rate: (tried[rate][0]["loss"], rate))
            kept[method] = [run for _, run in sorted(tried[best].items())]
    return kept


def label(method: Method) -> str:
    """What a method is called in tables."""
    name, rank = method
    plain, _, state = name.partition("@")
    if name == LONGER:
        return "the sweep's best LoRA, for as many seconds as ours"
    if (plain, rank) in OURS:
        return OURS[plain, rank] + (f" (@{state})" if state else "")
    for ending, words in (("+stretched", ", for as many seconds as ours"), ("+batch8", ", with our batch")):
        if name.endswith(ending):
            return label((name.removesuffix(ending), rank)) + words
    if name in TOOLS:
        return f"{TOOLS[name]} as shipped"
    return plain + (f", rank {rank}" if rank else "") + (f" (@{state})" if state else "")


def compared(method: Method) -> bool:
    """Whether it stands in the table of all tasks: what people would run, not what was tried to explain it."""
    plain = method[0].removesuffix("+stretched").removesuffix("+batch8")
    return method in OURS or plain in TOOLS or method[0].endswith("+stretched")


def order(methods: Iterable[Method]) -> list[Method]:
    """Ours, then tools as shipped, with our batch, stretched, then the rest."""
    groups = ("dynlora", "dynlora-auto")

    def place(method: Method) -> tuple[int, str, int]:
        name, rank = method
        if name.split("@")[0].split()[0] in groups:
            return (0, name, rank)
        if name in TOOLS:
            return (1, f"{list(TOOLS).index(name):02}", rank)
        return (2 if name.endswith("+batch8") else 3 if name.endswith("+stretched") else 4, name, rank)

    return sorted(methods, key=place)


def summary(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """A line a method, a column a task."""
    references = {task: found for task in tasks if (found := levels(records, task))}
    cells: dict[Method, dict[str, tuple[float, float]]] = {}
    for task, reference in references.items():
        for method, runs in chosen(records, task).items():
            if compared(method):
                share = spent(runs[0]) / sweep_cost(records, task)
                cells.setdefault(method, {})[task] = (above(runs, reference), share)
    rows = []
    for method in order(cells):
        found = cells[method]
        shown = [
            f"{found[task][0]:+.1f} ({100 * found[task][1]:.0f} %)" if task in found else "" for task in references
        ]
        whole = f"{mean(value for value, _ in found.values()):+.2f}" if len(found) == len(references) else ""
        rows.append([label(method), *shown, whole])
    return table(["", *references, "mean"], rows)


def details(records: Sequence[Record], task: str) -> str:
    """Every method on a task."""
    reference, methods = levels(records, task), chosen(records, task)
    rows = []
    for method in order(methods):
        runs = methods[method]
        run = runs[0]
        error = f"{mean(r['test'] for r in runs):.4f} ± {run['test_error']:.3f}"
        against = f"{above(runs, reference):+.1f} %" if reference else ""
        rank = f"{run['parameters'] / 1e6:.2f} M, {run['bytes'] / 1e6:.1f} MB"
        race = f" (rate {run['cpu_race']:.0f})" if run.get("cpu_race") else ""
        steps = run.get("steps") or run.get("summary", {}).get("steps", "")
        rate = f"{run['rate_used']:.1e}" if run.get("rate_used") else ""
        forgotten = f"{mean(r['general'] - r['general_before'] for r in runs):+.3f}"
        cost = f"{spent(run):.0f}{race}"
        rows.append(
            [
                label(method),
                str(steps),
                rate,
                rank,
                f"{mean(r['loss'] for r in runs):.4f}",
                error,
                against,
                forgotten,
                cost,
                str(len(runs)),
            ]
        )
    lines = sweep(records, task)
    head = ["", "steps", "rate", "size", "`val`", "`test`", "against the sweep", "general text", "CPU s", "seeds"]
    cost = f"The sweep: {len(lines)} runs, {sweep_cost(records, task):.0f} CPU seconds.\n" if lines else ""
    return table(head, rows) + "\n" + cost


def draw(records: Sequence[Record]) -> str:
    """Bars: percent above the best of the sweep, mean over tasks with a dot for each; empty where nothing can be compared."""
    references = {task: found for task in in_order(records, list(TASKS)) if (found := levels(records, task))}
    runs = {task: chosen(records, task) for task in references}
    everywhere = {m for found in runs.values() for m in found if all(m in other for other in runs.values())}
    ours = [m for m in OURS if m in everywhere and m in SHORTER]
    if not ours:
        return ""
    shown = []
    others = [(name, 0) for name in (LONGER, *TOOLS) if (name, 0) in everywhere]
    for method in [*ours, *others]:
        points = [above(runs[t][method], references[t]) for t in references]
        cost = sum(spent(runs[t][method][0]) for t in references) / sum(sweep_cost(records, t) for t in references)
        name = SHORTER.get(method) or TOOLS[method[0]]
        shown.append(Bar(name, points, f"{100 * cost:.0f} %", strong=method in ours))
    sets = f"{len(references)} data sets (dots)" if len(references) > 1 else f"the data set {next(iter(references))}"
    return bars(
        sorted(shown, key=lambda bar: mean(bar.points)),
        "Held-out loss, percent above the best LoRA of a sweep over rank and rate",
        f"{models_of(records)}, {sets}, one pass by the sweep and the tools; right: CPU time, of the sweep's",
    )
