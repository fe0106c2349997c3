"""Tables of `auto`: python scripts/bench/auto/tables.py  writes auto.md beside this file, from the runs on record.

- The guess at a learning rate against the best rate of every cell of quality.jsonl (seed 0), in loss: that of the
  formula as it is, and with its constants fitted without the task in question.
- What a race costs, and what it finds, by the length of the run.
- Passes over few rows.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dynlora_cli.training.rate.prior import rate_for  # noqa: E402

Record = dict[str, Any]
Cell = tuple[str, str, int]  # task, method, components per layer at the start
# Of the models of the tasks: width of most layers' inputs, root mean square of the weights.
MODELS = {"stories3M": (192, 0.0275), "builtin:tiny": (192, 0.0865), "SmolLM2-135M-Instruct": (576, 0.193)}
OF_TASK = {
    "e2e": "stories3M", "dolly": "stories3M", "chat": "stories3M", "shakespeare": "stories3M", "mix": "stories3M",
    "svamp": "builtin:tiny", "gsm8k": "builtin:tiny", "wikitext": "builtin:tiny",
}  # fmt: skip
GRID = ("lora", "dynlora")


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# -- the guess -------------------------------------------------------------------------------------------------------


def curves(records: list[Record]) -> dict[Cell, dict[float, float]]:
    """Loss by rate of every language cell with at least four rates, seed 0."""
    found: dict[Cell, dict[float, float]] = defaultdict(dict)
    for record in records:
        if record["seed"] == 0 and record["method"] in GRID and record["task"] in OF_TASK and record["loss"] < math.inf:
            start = record["budget"] * (2 if record["method"] == "dynlora" else 1)
            found[record["task"], record["method"], start][record["rate"]] = record["loss"]
    return {cell: losses for cell, losses in found.items() if len(losses) >= 4}


def excess(losses: dict[float, float], rate: float) -> float:
    """How far the loss at a rate lies above the lowest of the curve, in percent; straight lines between its points."""
    points = sorted((math.log2(known), loss) for known, loss in losses.items())
    x, (xs, ys) = math.log2(rate), zip(*points, strict=True)
    if x <= xs[0]:
        loss = ys[0] + (xs[0] - x) * abs(ys[0] - ys[1]) / (xs[1] - xs[0])
    elif x >= xs[-1]:
        loss = ys[-1] + (x - xs[-1]) * abs(ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    else:
        loss = float(np.interp(x, xs, ys))
    return 100 * math.log(loss / min(ys))


def features(cell: Cell) -> list[float]:
    _, weight = MODELS[OF_TASK[cell[0]]]
    return [1.0, math.log2(cell[2]), math.log2(weight)]


def without(task: str, cells: dict[Cell, dict[float, float]]) -> Callable[[Cell], float]:
    """The same formula, its constants (the length's and the width's apart) fitted on all other tasks."""
    others = [cell for cell in cells if cell[0] != task]
    best = [math.log2(min(cells[cell], key=cells[cell].__getitem__)) for cell in others]
    weights = np.linalg.lstsq(np.array([features(cell) for cell in others]), np.array(best), rcond=None)[0]
    return lambda cell: 2 ** float(np.dot(features(cell), weights))


def ours(cell: Cell) -> float:
    return rate_for(cell[2], *MODELS[OF_TASK[cell[0]]], steps=200)


def tinker(cell: Cell) -> float:
    """Its published formula for Llama, halved since our scale is twice theirs; it knows no rank."""
    width, _ = MODELS[OF_TASK[cell[0]]]
    return 0.5 * 5e-5 * 10 * (2000 / width) ** 0.781


def guess_table(records: list[Record]) -> str:
    cells = curves(records)
    rules: dict[str, Callable[[Cell], float]] = {
        "the guess": ours,
        "its constants fitted without the task": lambda cell: without(cell[0], cells)(cell),
        "2e-3 for all": lambda cell: 2e-3,  # noqa: ARG005
        "2e-4 for all": lambda cell: 2e-4,  # noqa: ARG005
        "Tinker's formula, halved": tinker,
    }
    tasks = sorted({cell[0] for cell in cells})
    lines = [f"| rule | {' | '.join(tasks)} | mean | worst |", f"|---|{'---|' * (len(tasks) + 2)}"]
    for name, rule in rules.items():
        found = {cell: excess(cells[cell], rule(cell)) for cell in cells}
        of_task = [mean(value for cell, value in found.items() if cell[0] == task) for task in tasks]
        numbers = [*of_task, mean(found.values()), max(found.values())]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in numbers) + " |")
    return "\n".join(lines)


def curve_table(records: list[Record]) -> str:
    """Whole runs by rate, with the guess beside them."""
    cells: dict[tuple[str, str, int], dict[float, float]] = defaultdict(dict)
    for record in records:
        if record["rate"] and not record["rows"] and record["loss"] < math.inf and record["budget"] == 8:
            cells[record["task"], record["model"], record["steps"]][record["rate"]] = record["loss"]
    lines = ["| task | model | steps | loss by rate | best | guess | above the best |", "|---|---|---|---|---|---|---|"]
    for (task, model, steps), losses in sorted(cells.items()):
        if len(losses) < 3:
            continue
        model = model or OF_TASK.get(task, "minilm")
        if model not in MODELS:
            continue
        guess = rate_for(16, *MODELS[model], steps=steps)
        listed = ", ".join(f"{loss:.4f} at {rate:.1e}" for rate, loss in sorted(losses.items()))
        best = min(losses, key=losses.__getitem__)
        lines.append(
            f"| {task} | {model} | {steps} | {listed} | {best:.1e} | {guess:.1e} | {excess(losses, guess):.2f} % |"
        )
    return "\n".join(lines)


# -- races and passes ------------------------------------------------------------------------------------------------


def race_table(records: list[Record]) -> str:
    """Runs with `auto`: what was found, and what the losers took."""
    lines = ["| task | steps | rate | found by | steps thrown away | loss |", "|---|---|---|---|---|---|"]
    for record in records:
        if record["rate"] or record["rows"] or "rate_from" not in record:
            continue
        share = record["thrown_away"] / record["steps"]
        lines.append(
            f"| {record['task']} | {record['steps']} | {record['rate_used']:.1e} | {record['rate_from']} | "
            f"{record['thrown_away']} ({100 * share:.1f} %) | {record['loss']:.4f} |"
        )
    return "\n".join(lines)


def passes_table(records: list[Record]) -> str:
    cells: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
    for record in records:
        epochs = [part.partition("=")[2] for part in record["settings"].split() if part.startswith("train.epochs=")]
        if record["rows"] and epochs and epochs[0].isdigit():
            cells[record["task"], record["rows"]][int(epochs[0])] = record
    counts = sorted({count for losses in cells.values() for count in losses})
    lines = [f"| task | rows | {' | '.join(f'{count}' for count in counts)} |", f"|---|---|{'---|' * len(counts)}"]
    for (task, rows), found in sorted(cells.items()):
        shown = [
            f"{found[n]['loss']:.4f} ({min(loss for _, loss in found[n]['evaluations']):.4f})" if n in found else ""
            for n in counts
        ]
        lines.append(f"| {task} | {rows} | {' | '.join(shown)} |")
    return "\n".join(lines)


def page(quality: list[Record], runs: list[Record]) -> str:
    return f"""# What `auto` finds

Made by `scripts/bench/auto/tables.py` from quality.jsonl and runs.jsonl.

## The guess at a learning rate

Percent above the lowest loss of a cell's rate curve (`val`, 200 steps, seed 0, ranks 1 to 32), mean over a task's cells.

{guess_table(quality)}

At other lengths (budget 8, `val` loss; of SmolLM2 the training loss of the last 8 steps):

{curve_table(runs)}

## The race

{race_table(runs)}

## Passes over few rows

`val` loss at the end, in brackets the lowest on the way, by passes over the rows.

{passes_table(runs)}
"""


def main() -> int:
    text = page(read(HERE.parent / "quality.jsonl"), read(HERE / "runs.jsonl"))
    (HERE / "auto.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
