"""forgetting.md and forgetting.svg from forgetting.jsonl, and from real.jsonl where a run there names general text."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import itertools

from quality_tables import draw

Result = dict[str, Any]
METHODS = ("lora", "rslora", "dora", "dynlora")
Cell = tuple[str, str, int]  # task, method, rank
Means = dict[float, dict[str, float]]  # by rate: mean loss on test, mean rise, and their spread


def usable(results: list[Result]) -> list[Result]:
    return [r for r in results if r.get("loss") is not None and r.get("general") is not None]


def by_cell(results: list[Result]) -> dict[Cell, list[Result]]:
    cells: dict[Cell, list[Result]] = defaultdict(list)
    for r in usable(results):
        cells[r["task"], r["method"], r["budget"]].append(r)
    return dict(cells)


def rise(r: Result) -> float:
    return float(r["general"] - r["general_before"])


def tuned(lines: list[Result]) -> list[Result]:
    """The runs at the rate that is best on `val` with the first seed."""
    first = min(r["seed"] for r in lines)
    best = min((r for r in lines if r["seed"] == first), key=lambda r: r["loss"])
    return [r for r in lines if r["rate"] == best["rate"]]


def rise_at(lines: list[Result], loss: float) -> float | None:
    """Forgotten where a method's curve over rates reaches a test loss; of its lowest rates, since forgetting grows with them.

    None where no rate on the grid reaches it, or all do (which would be a guess beyond the grid).
    """
    points = []
    for rate in sorted({r["rate"] for r in lines}):
        runs = [r for r in lines if r["rate"] == rate]
        points.append((mean(r["test"] for r in runs), mean(map(rise, runs))))
    for (high, before), (low, after) in itertools.pairwise(points):
        if low <= loss <= high and high > low:
            return before + (high - loss) / (high - low) * (after - before)
    return None


def _spread(values: list[float], digits: int = 3) -> str:
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _grid(head: list[str], rows: list[list[object]]) -> str:
    return "\n".join([_line(*head), _line(*["---"] * len(head)), *(_line(*row) for row in rows)])


def _tuned_rows(cells: dict[Cell, list[Result]], task: str) -> list[list[object]]:
    rows: list[list[object]] = []
    for (name, method, rank), lines in sorted(cells.items(), key=lambda c: (c[0][2], METHODS.index(c[0][1]))):
        if name == task:
            best = tuned(lines)
            losses, rises = [r["test"] for r in best], [rise(r) for r in best]
            size = f"{best[0]['parameters']:,}"
            rows.append([rank, method, size, f"{best[0]['rate']:.1e}", _spread(losses), _spread(rises), len(best)])
    return rows


def _matched_rows(cells: dict[Cell, list[Result]], task: str) -> list[list[object]]:
    """Forgotten at the loss that the worst method of each rank reaches at its tuned rate, so that all reach it."""
    rows: list[list[object]] = []
    for rank in sorted({r for t, _, r in cells if t == task}):
        here = {m: cells[task, m, rank] for m in METHODS if (task, m, rank) in cells}
        target = max(mean(r["test"] for r in tuned(lines)) for lines in here.values())
        found = {method: rise_at(lines, target) for method, lines in here.items()}
        values = ["" if found.get(m) is None else f"{found[m]:.3f}" for m in METHODS]
        rows.append([rank, f"{target:.4f}", *values])
    return rows


def _rate_rows(cells: dict[Cell, list[Result]], task: str) -> list[list[object]]:
    rows: list[list[object]] = []
    rates = sorted({r["rate"] for (t, _, _), lines in cells.items() if t == task for r in lines})
    for (name, method, rank), lines in sorted(cells.items(), key=lambda c: (c[0][2], METHODS.index(c[0][1]))):
        if name == task:
            cellwise: list[object] = [rank, method]
            for rate in rates:
                runs = [r for r in lines if r["rate"] == rate]
                cellwise.append(f"{mean(r['test'] for r in runs):.3f} / {mean(map(rise, runs)):+.3f}" if runs else "")
            rows.append(cellwise)
    return [["rank", "method", *(f"{rate:.1e}" for rate in rates)], *rows]


def _real(lines: list[Result]) -> str:
    """Every run on the real model, by task and loss: which rate forgets what."""
    rows: list[list[object]] = [
        [
            r["task"], r["method"], r["rank"] or "its own", f"{r['rate_used']:.1e}", f"{r['parameters']:,}",
            f"{r['test']:.4f}", f"{rise(r):+.4f}",
        ]
        for r in sorted(lines, key=lambda r: (r["task"], r["test"]))
    ]  # fmt: skip
    return _grid(["task", "method", "rank", "rate", "parameters", "loss", "forgotten"], rows)


def table(results: list[Result], real: Sequence[Result] = ()) -> str:
    cells = {cell: lines for cell, lines in by_cell(results).items() if cell[1] in METHODS}
    parts = [
        """# What a fine-tuned adapter forgets

Made by `forgetting.py table` from forgetting.jsonl (and real.jsonl); do not edit. Loss: nats per token of the task's
test part. Forgotten: the rise of the loss on general text, nats per token. Mean (min to max) of the seeds.
"""
    ]
    for task in sorted({task for task, _, _ in cells}):
        rates = _rate_rows(cells, task)
        parts += [
            f"## {task}\n\nEach method at the best of the rates that were tried, by its loss on `val`:\n",
            _grid(["rank", "method", "parameters", "rate", "loss", "forgotten", "seeds"], _tuned_rows(cells, task)),
            "\nAt equal loss, that of the rank's worst method, between the rates of the grid:\n",
            _grid(["rank", "loss", *METHODS], _matched_rows(cells, task)),
            "\nLoss / forgotten at every rate:\n",
            _grid(list(map(str, rates[0])), rates[1:]),
            "",
        ]
    if real:
        parts += [
            "## SmolLM2-135M-Instruct\n\nRuns of real.jsonl, as others ship them and as `dynlora train` is, one seed:\n",
            _real(list(real)),
            "",
        ]
    return "\n".join(parts)


def picture(results: list[Result]) -> str:
    """Forgotten over parameters at the tuned rate; empty before there is a line to draw."""
    cells = by_cell(results)
    task = max({t for t, _, _ in cells}, key=lambda t: sum(1 for c in cells if c[0] == t), default="")
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, method, _), runs in cells.items():
        if name == task and method in METHODS:
            best = tuned(runs)
            point = (best[0]["parameters"], 100 * mean(map(rise, best)))
            lines.setdefault(method, []).append(point)
    if max(map(len, lines.values()), default=0) < 2:
        return ""
    least = min(x for points in lines.values() for x, _ in points)
    scaled = {m: [(x / least, y) for x, y in points] for m, points in lines.items()}
    return draw(scaled, f"parameters, relative to {least:,} ({task})", "forgotten, hundredths of a nat per token")
