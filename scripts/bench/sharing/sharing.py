"""Two ideas against tuned LoRA at equal size: components shared across layers, and starts from the first gradient.

    python scripts/bench/sharing/sharing.py all       # the whole plan, of which sharing.md shows what has been run
    python scripts/bench/sharing/sharing.py run --tasks e2e,e2e@800 --methods lora,pool --budgets 1,4 --seeds 2
    python scripts/bench/sharing/sharing.py table     # only write sharing.md again

An idea stays if it gains 1.5 % over LoRA in runs of 800 steps, each at its best rate, and goes otherwise. Tasks, schedule and
loss are those of quality.py; `small` is its e2e on stories260K, where whole surveys are cheap. Rates are chosen on seed 0 by
the `val` loss: factors of 2 with the best one inside, then half a factor on either side (not with --coarse). All forms and
rates of a task, rank and seed train side by side (side_by_side.py), LoRA among them. A run is a line of sharing.jsonl; what is
there is not run again.

pool, rasa, mos, mos-gated, pool-equal    forms of sharing: shared_layers.py
lora-one, lora-one-g16                    both factors from the first gradient, divided by the root of 128 or 16
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from quality import read_results  # noqa: E402 - scripts, not a package
from quality_tables import Cell, Chosen, choose, paired, table  # noqa: E402
from quality_tasks import TASKS, base_name, find_task  # noqa: E402

RESULTS = HERE / "sharing.jsonl"
STOCK = HERE.parent / "quality_long.jsonl"
SHARING = ["pool", "rasa", "mos", "mos-gated", "pool-equal"]
STARTS = ["lora-one", "lora-one-g16"]
TITLES = {"Components shared across layers": SHARING, "Both factors from the first gradient (LoRA-One)": STARTS}
# The middle of the first three rates; at rank 4 half of it.
FIRST = {"lora": 8e-3, **dict.fromkeys(SHARING, 8e-3), **dict.fromkeys(STARTS, 1e-3)}
FIRST_OF_THREE_MILLION = 0.5  # stories3M wants half the rates of stories260K
THRESHOLD = 1.5  # percent
PLAN = [  # tasks, methods, ranks, seeds
    (["small@800"], ["lora", "pool", "mos", "lora-one"], [1], 3),
    (["e2e@800"], ["lora", "pool", "lora-one"], [1], 3),
    (["small@800"], ["lora", *SHARING, *STARTS], [1, 2, 4], 3),
    (["small", "e2e"], ["lora", *SHARING, *STARTS], [1, 4], 3),
]
Record = dict[str, Any]

if "small" not in TASKS:  # not among quality.py's own: its final table has one line for every one of those
    TASKS["small"] = replace(TASKS["e2e"], model="stories260K")


def run(task: str, rank: int, methods: Sequence[str], seeds: int, results: Path, work: Path, coarse: bool) -> None:
    """Search every method's rate on seed 0, then run the other seeds with it."""
    while wanted := rates_left(task, rank, methods, results, coarse):
        train(task, rank, wanted, 0, results, work)
    for seed in range(1, seeds):
        losses = {method: tried(results, task, rank, method, 0) for method in methods}
        best = {method: [min(found, key=found.__getitem__)] for method, found in losses.items()}
        train_new(task, rank, best, seed, results, work)


def train_new(task: str, rank: int, wanted: dict[str, list[float]], seed: int, results: Path, work: Path) -> None:
    """Train what is not there."""
    new = {m: [r for r in rates if r not in tried(results, task, rank, m, seed)] for m, rates in wanted.items()}
    new = {method: rates for method, rates in new.items() if rates}
    if new:
        train(task, rank, new, seed, results, work)


def rates_left(task: str, rank: int, methods: Sequence[str], results: Path, coarse: bool) -> dict[str, list[float]]:
    """By method, what its search wants to try next."""
    losses = {method: tried(results, task, rank, method, 0) for method in methods}
    found = {method: next_rates(losses[method], first(task, rank, method), coarse) for method in methods}
    return {method: rates for method, rates in found.items() if rates}


def first(task: str, rank: int, method: str) -> float:
    size = 1.0 if find_task(task).model == "stories260K" else FIRST_OF_THREE_MILLION
    return FIRST[method] * size * (0.5 if rank > 2 else 1.0)


def tried(results: Path, task: str, rank: int, method: str, seed: int) -> dict[float, float]:
    """`val` loss by rate."""
    cell = (task, method, rank, seed)
    lines = read_results(results)
    return {r["rate"]: r["loss"] for r in lines if (r["task"], r["method"], r["budget"], r["seed"]) == cell}


def next_rates(losses: dict[float, float], middle: float, coarse: bool) -> list[float]:
    """What to try next; nothing when the best rate lies inside a grid of factors of 2, with a finer step around it."""
    if not losses:
        return [middle / 2, middle, middle * 2]
    steps = {round(2 * math.log2(rate / middle)): loss for rate, loss in losses.items()}
    best = min((step for step in steps if step % 2 == 0), key=lambda step: (steps[step], step))
    missing = [step for step in (best - 2, best + 2) if step not in steps]
    if not missing and not coarse:
        missing = [step for step in (best - 1, best + 1) if step not in steps]
    return [middle * 2 ** (step / 2) for step in missing]


def train(task: str, rank: int, wanted: dict[str, list[float]], seed: int, results: Path, work: Path) -> None:
    import side_by_side

    print(task, rank, "seed", seed, {m: [f"{rate:.1e}" for rate in rates] for m, rates in wanted.items()}, flush=True)
    lines = side_by_side.train(task, rank, wanted, seed, work)
    with results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# -- the table -------------------------------------------------------------------------------------------------------


def page(records: Iterable[Record], stock: Iterable[Record] = ()) -> str:
    """The whole of sharing.md; stock PEFT's LoRA stands for seeds that had no LoRA side by side."""
    records = list(records)
    own = {(r["task"], r["budget"], r["seed"]) for r in records if r["method"] == "lora"}
    stock = [r for r in stock if r["method"] == "lora" and (r["task"], r["budget"], r["seed"]) not in own]
    cells, hours = choose([*records, *stock]), sum(record["cpu"] for record in records) / 3600
    parts = [
        "# Two ideas against tuned LoRA at equal size\n",
        f"Made by `scripts/bench/sharing/sharing.py table`: {len(records)} runs, {hours:.1f} CPU hours. The rule: an idea that gains "
        f"less than {THRESHOLD} % over LoRA at 800 steps goes. What is measured is said in the script. `against LoRA`: percent "
        "of its loss with the same rank, task, steps and seeds, both at their best rates (`val`, seed 0; in brackets "
        "the lowest and highest seed, and their number); below zero the idea is better. Sizes are multiples of LoRA's: what is "
        "trained, the same update saved as plain LoRA, and saved as PEFT's VeRA type.\n",
    ]
    for title, methods in TITLES.items():
        parts += [f"## {title}\n", verdict(cells, methods), rows_of(cells, methods, [*records, *stock])]
    return "\n".join(parts)


def verdict(cells: dict[Cell, Chosen], methods: Sequence[str]) -> str:
    """Which method passes the rule on both parts, in the mean over its cells of 800 steps."""
    said = []
    for method in methods:
        long = [cell for cell in compared(cells, [method]) if find_task(cell[0]).steps == 800]
        if long:
            test, val = (mean(difference(cells, cell, key)[0] for cell in long) for key in ("test", "loss"))
            word = "passes" if max(test, val) <= -THRESHOLD else "is out"
            number = f"{len(long)} cell{'s' * (len(long) > 1)}"
            said.append(
                f"- `{method}` at 800 steps: `test` {test:+.1f} %, `val` {val:+.1f} % in the mean of {number}: {word}.\n"
            )
    return "".join(said)


def compared(cells: dict[Cell, Chosen], methods: Sequence[str]) -> list[Cell]:
    """Cells of these methods that have LoRA beside them, by task, rank and length."""
    order = sorted(cells, key=lambda c: (base_name(c[0]), c[2], find_task(c[0]).steps, c[1]))
    return [cell for cell in order if cell[1] in methods and (cell[0], "lora", cell[2]) in cells]


def difference(cells: dict[Cell, Chosen], cell: Cell, key: str = "test") -> tuple[float, float, float, int]:
    """Mean, lowest and highest over seeds, in percent, and the number of seeds."""
    task, method, budget = cell
    (found,) = paired(cells, [task], (method, budget), ("lora", budget), key).values()
    return mean(found), min(found), max(found), len(found)


def rows_of(cells: dict[Cell, Chosen], methods: Sequence[str], records: Sequence[Record]) -> str:
    rows = []
    for cell in compared(cells, methods):
        task, method, budget = cell
        idea, lora = cells[cell], cells[task, "lora", budget]
        about = [base_name(task), str(budget), str(find_task(task).steps), f"`{method}`"]
        rates = [spelled(idea.rate, cell, records), spelled(lora.rate, (task, "lora", budget), records)]
        losses = [f"{idea.runs[0]['loss']:.4f}", f"{lora.runs[0]['loss']:.4f}"]
        against = ["{:+.1f} % ({:+.1f} to {:+.1f}; {})".format(*difference(cells, cell, k)) for k in ("loss", "test")]
        sizes = [f"{idea.runs[0][key] / lora.mean('parameters'):.2f}x" for key in ("parameters", "expanded", "vera")]
        rows.append([*about, *rates, *losses, *against, *sizes])
    head = [
        "task",
        "rank",
        "steps",
        "method",
        "rate (tried)",
        "LoRA's",
        "val, seed 0",
        "LoRA's",
        "against LoRA, val",
        "test",
    ]
    return table([*head, "trained", "as plain LoRA", "as VeRA"], rows)


def spelled(rate: float, cell: Cell, records: Sequence[Record]) -> str:
    """The rate chosen, and how many were tried."""
    count = sum((r["task"], r["method"], r["budget"], r["seed"]) == (*cell, 0) for r in records)
    return f"{rate:.1e} ({count})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "all", "table"])
    parser.add_argument("--tasks", default="small@800")
    parser.add_argument("--methods", default=",".join(["lora", *SHARING, *STARTS]))
    parser.add_argument("--budgets", default="1,4")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--coarse", action="store_true", help="rates a factor of 2 apart, without the finer step")
    parser.add_argument("--rates", default="", help="all seeds at these rates, without a search")
    parser.add_argument("--first-seed", type=int, default=0, help="with --rates: the first of the seeds")
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    asked = [(options.tasks.split(","), options.methods.split(","), budgets, options.seeds)]
    work = options.work.resolve()
    for tasks, methods, ranks, seeds in {"run": asked, "all": PLAN, "table": []}[options.stage]:
        work.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            find_task(task)
            for rank in ranks:
                if options.rates:
                    rates = [float(rate) for rate in options.rates.split(",")]
                    for seed in range(options.first_seed, options.first_seed + seeds):
                        train_new(task, rank, dict.fromkeys(methods, rates), seed, options.results, work)
                else:
                    run(task, rank, methods, seeds, options.results, work, options.coarse)
    options.results.with_suffix(".md").write_text(
        page(read_results(options.results), read_results(STOCK)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
