"""Does a rank that follows the data learn more per parameter than a fixed one? Against stock PEFT, on real data.

    python scripts/bench/quality.py curve             # where does rank matter? LoRA at ranks 1 to 32, every task
    python scripts/bench/quality.py design            # the design tasks, for choosing the algorithm
    python scripts/bench/quality.py final             # the table: the other tasks, budgets 1, 2, 4
    python scripts/bench/quality.py run --tasks e2e --methods lora,dynlora --budgets 1 --seeds 3
    python scripts/bench/quality.py table             # only write RESULTS.md again; with --results FILE, FILE's own page
    python scripts/bench/quality.py run --tasks e2e@800,e2e@2000 --methods lora,dynlora --budgets 1 --seeds 2 \\
        --results scripts/bench/quality_long.jsonl    # longer runs, in a file and a table (quality_long.md) of their own

A cell is a task, a method and a budget. Its learning rate is chosen on seed 0 by the loss on the `val` part, from a grid
of factors of 2 that is extended until the best is inside it, and then half a factor on either side; with the best it
runs with the other seeds, on the same batches in the same order as every other method with that seed. (`dynlora-auto-rate` finds its own rate, `dynlora-auto` its rank too;
their `budget` and rate mean nothing.) The `test` part is read in the same go and used for nothing but the
table. Every run is a line of quality.jsonl; what is there is not run again. Data and models are in DYNLORA_SHARED
(../shared).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from quality_lengths import page
from quality_tables import choose, pareto_svg, results
from quality_tasks import TASKS, base_name, find_task

RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
# Where the search for the learning rate begins, until other tasks tell better.
FIRST_RATE = {"rslora": 1e-3, "adalora": 8e-3, "lora-4x": 2e-3}  # 4e-3 elsewhere
RIVALS = ["lora", "rslora", "dora", "adalora", "eva"]
BOUNDS = ["lora-4x", "lora-4x-cut"]
CONTROLS = ["dynlora pruning.policy=random", "dynlora-map", "dynlora-map-shuffled"]
Record = dict[str, Any]
Cell = tuple[str, str, int]  # task, method, budget


def read_results(path: Path = RESULTS) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_cell(cell: Cell, seeds: int, results: Path, work: Path, coarse: bool = False) -> str:
    """Choose the cell's learning rate, then run the other seeds with it."""
    task, method, budget = cell
    rate = 0.0 if method.startswith("dynlora-auto") else choose_rate(cell, results, work, coarse)
    losses = [measure(cell, rate, seed, results, work) for seed in range(seeds)]
    return f"{task:12} {method:16} budget {budget}  rate {rate:.1e}  " + " ".join(f"{loss:.4f}" for loss in losses)


def choose_rate(cell: Cell, results: Path, work: Path, coarse: bool = False) -> float:
    """The best of a geometric grid on seed 0, neither end of which is the best, with a finer step around it.

    Methods whose best rates lie a factor of 1.4 apart would differ by a percent on a grid of factors of 2 alone, either
    way, by nothing but where the grid happens to fall. `coarse` leaves the finer step out.
    """
    known = read_results(results)
    if "@" in cell[0]:  # runs of the usual length tell where to begin
        known += read_results(RESULTS)
    return climb(lambda rate: measure(cell, rate, 0, results, work), first_rate(cell, known), finer=not coarse)


def climb(loss_at: Callable[[float], float], first: float, *, finer: bool = True) -> float:
    """The rate with the lowest loss among factors of 2 around it, both neighbours of which were tried.

    Args:
        loss_at: of a whole run at this rate.
        first: a guess, on the grid.
        finer: half a factor on either side is tried too.
    """
    losses: dict[float, float] = {}

    def loss(k: float) -> float:
        if k not in losses:
            losses[k] = loss_at(first * 2.0**k)
        return losses[k]

    def best() -> float:
        return min(losses, key=lambda k: (losses[k], k))

    loss(0)
    loss(1)
    while not {best() - 1, best() + 1} <= losses.keys():
        loss(best() + 1 if best() + 1 not in losses else best() - 1)
    middle = best()
    if finer:
        loss(middle - 0.5)
        loss(middle + 0.5)
    return first * 2.0 ** best()


def first_rate(cell: Cell, records: list[Record]) -> float:
    """A guess at the cell's best rate, from cells like it; always on the same grid of powers of 2."""
    task, method, budget = cell
    base = base_name(task)
    best: dict[Cell, tuple[float, float]] = {}
    for record in records:
        if record["seed"] == 0 and record["method"] in (method, method.split()[0]):
            key = (record["task"], record["method"], record["budget"])
            best[key] = min(best.get(key, (math.inf, 0.0)), (record["loss"], record["rate"]))
    near = [
        {k: v for k, v in best.items() if k[0] == task and k[2] == budget},
        {k: v for k, v in best.items() if base_name(k[0]) == base and k[2] == budget},
        {k: v for k, v in best.items() if k[2] == budget},
        best,
    ]
    kin = next(([rate for _, rate in cells.values()] for cells in near if cells), [])
    guess = median(kin) if kin else FIRST_RATE.get(method, 4e-3)
    return 1e-3 * 2.0 ** round(math.log2(guess / 1e-3))


def measure(cell: Cell, rate: float, seed: int, results: Path, work: Path) -> float:
    """The run's held-out loss, from the file or by running it; appended to the file."""
    from quality_methods import Job, run

    job = Job(*cell, rate, seed)
    earlier = read_results(results)
    for record in earlier:
        if Job(*(record[k] for k in ("task", "method", "budget", "rate", "seed"))).key == job.key:
            return float(record["loss"])
    started, used = time.time(), time.process_time()
    found = run(job, work, earlier)
    times = {"wall": round(time.time() - started, 1), "cpu": round(time.process_time() - used, 1)}
    record = {**job.__dict__, **found, **times}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return float(found["loss"])


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_cells(cells: Iterable[Cell], seeds: int, results: Path, work: Path, workers: int, coarse: bool = False) -> None:
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        futures = [pool.submit(run_cell, cell, seeds, results, work, coarse) for cell in cells]
        for future in as_completed(futures):
            print(future.result(), flush=True)


def write_tables(path: Path, design: list[str]) -> None:
    """RESULTS.md and its picture; of lines in another file, a page beside them under their own name."""
    records = read_results(path)
    if path.resolve() != RESULTS:
        path.with_suffix(".md").write_text(page(records, read_results(RESULTS)), encoding="utf-8")
        return
    final, known = [name for name in TASKS if name not in design], [*RIVALS, "dynlora", *BOUNDS]
    path.with_name("RESULTS.md").write_text(results(records, design, final, known), encoding="utf-8")
    # Over the language tasks: the losses of classifiers that are nearly right differ by a third from seed to seed.
    language = [name for name in final if not TASKS[name].classify]
    shown = ["lora", "dynlora", *RIVALS[1:], "dynlora-dora-size", "lora-4x-cut"]
    picture = pareto_svg(choose(records), language, shown, [1, 2, 4])
    if picture:
        path.with_suffix(".svg").write_text(picture, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["curve", "design", "final", "run", "table"])
    parser.add_argument("--tasks", default="")
    parser.add_argument("--methods", default="")
    parser.add_argument("--budgets", default="1,2,4")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--coarse", action="store_true", help="rates a factor of 2 apart, without the finer step")
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    design = [name for name, task in TASKS.items() if task.design]
    tasks, methods, budgets, seeds = {
        "curve": (list(TASKS), ["lora"], [1, 2, 4, 8, 16, 32], 1),
        "design": (design, [*RIVALS, "dynlora"], [1, 2, 4], 3),
        "final": (
            [name for name in TASKS if name not in design],
            ["lora", "dynlora", *RIVALS[1:], "dynlora-dora-size", *BOUNDS, *CONTROLS],
            [1, 2, 4],
            5,
        ),
        "run": (
            options.tasks.split(","),
            options.methods.split(","),
            [int(b) for b in options.budgets.split(",")],
            options.seeds,
        ),
        "table": ([], [], [], 0),
    }[options.stage]
    for task in tasks:
        find_task(task)  # a wrong name is told before anything runs
    cells = [(task, method, budget) for budget, method, task in product(budgets, methods, tasks)]
    if cells:
        run_cells(cells, seeds, options.results, options.work.resolve(), options.workers, options.coarse)
    write_tables(options.results, design)
    return 0


if __name__ == "__main__":
    sys.exit(main())
