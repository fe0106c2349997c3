"""Is a teacher from the run itself worth its seconds? Survivors of pruning, taught by what they were pruned from.

    python scripts/bench/teacher/teacher.py at --tasks e2e --methods "ours;ours k=0.7" --budgets 1 --rates 4e-3 --seeds 0,1
    python scripts/bench/teacher/teacher.py tune --tasks e2e@800 --methods "ours k=0.7" --budgets 1,2 --seeds 0,1,2
    python scripts/bench/teacher/teacher.py baselines     # runs without a teacher, from the results of quality.py
    python scripts/bench/teacher/teacher.py table

A task is one of quality.py's, `e2e@800` the same with so many steps. `at` runs at the rates given, `tune` chooses the
rate as quality.py does. Methods: teacher_methods.py. Every run is a line of teacher.jsonl; what is there is not run
again. `val` serves every choice; `test` is read in the same go, for the table alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import quality  # noqa: E402 - scripts, not a package

RESULTS = HERE / "teacher.jsonl"
BASELINES = [HERE.parent / "quality.jsonl", HERE.parent / "quality_long.jsonl"]


def measure(cell: quality.Cell, rate: float, seed: int, results: Path, work: Path) -> float:
    from teacher_methods import Job, run

    job = Job(*cell, rate, seed)
    for record in quality.read_results(results):
        if Job(*(record[k] for k in ("task", "method", "budget", "rate", "seed"))).key == job.key:
            return float(record["loss"])
    started = time.time()
    record: dict[str, Any] = {**job.__dict__, **run(job, work), "wall": round(time.time() - started, 1)}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{job.task:10} {job.method:40} {job.budget} {rate:.2e} {seed}  {record['loss']:.5f}", flush=True)
    return float(record["loss"])


def take_baselines(results: Path) -> None:
    """Copy the runs without a teacher that quality.py made of our tasks and ranks, and that are not there yet."""
    from teacher_tables import missing

    records = quality.read_results(results)
    with results.open("a", encoding="utf-8") as file:
        for path in BASELINES:
            for record in missing(records, quality.read_results(path)):
                file.write(json.dumps({**record, "from": path.name}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["at", "tune", "baselines", "table"])
    parser.add_argument("--tasks", default="e2e,svamp")
    parser.add_argument("--methods", default="ours;ours k=0.7")
    parser.add_argument("--budgets", default="1")
    parser.add_argument("--rates", default="4e-3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("out/teacher"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.stage == "baselines":
        take_baselines(options.results)
        return 0
    if options.stage == "table":
        from teacher_tables import results

        text = results(quality.read_results(options.results))
        options.results.with_suffix(".md").write_text(text, encoding="utf-8")
        return 0
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    tasks = options.tasks.split(",")
    budgets = [int(budget) for budget in options.budgets.split(",")]
    quality.measure = measure  # type: ignore[assignment] - its search for a rate, over our runs
    for budget, task, method in product(budgets, tasks, options.methods.split(";")):
        cell = (task, method, budget)
        if options.stage == "tune":
            rates = [quality.choose_rate(cell, options.results, work)]
        else:
            rates = [float(rate) for rate in options.rates.split(",")]
        for rate, seed in product(rates, seeds):
            measure(cell, rate, seed, options.results, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
