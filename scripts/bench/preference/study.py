"""Does a rank that follows the data change DPO at equal size?

    PREFERENCE_HH=/path/to/hh-rlhf python scripts/bench/preference/study.py run [--minutes 60] [--work FOLDER]
    python scripts/bench/preference/study.py table

fixed     LoRA with as many components in every layer for the whole run: the budget
dynamic   twice as many at the start, pruned to the budget by the Fisher information of the DPO loss

A cell is a set of pairs (pairs.py), a method and a budget. Its learning rate is chosen on seed 0 by the loss on the `val`
rows, from factors of 2 with the best one inside; with it run three seeds, measured on the `test` rows. Both methods see
the same batches. Every run is a line of study.jsonl; what is there is not run again. The base is stories260K after
supervised fine-tuning, loss sigmoid with beta 0.1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pairs import prepare

from dynlora_cli import api
from dynlora_cli.errors import MeasureError

RESULTS, TABLE = Path(__file__).with_suffix(".jsonl"), Path(__file__).with_suffix(".md")
METHODS = ("fixed", "dynamic")
CELLS = [("e2e", budget) for budget in (1, 2, 4)] + [("hh", budget) for budget in (1, 4)]
STEPS, BATCH, SEEDS = 48, 8, (0, 1, 2)
FIRST_RATE = {"e2e": 4e-3, "hh": 4e-3}
Record = dict[str, Any]


def read_results() -> list[Record]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def run(name: str, method: str, budget: int, rate: float, seed: int, part: str, work: Path) -> Record:
    """The line of one run, from the file or from a run."""
    key = {"set": name, "method": method, "budget": budget, "rate": rate, "seed": seed, "part": part}
    for record in read_results():
        if all(record[field] == value for field, value in key.items()):
            return record
    rows, model = prepare(name, work)
    started = time.time()
    recipe = {
        "model": str(model),
        "dataset": {
            "train": [{"path": str(rows / "train.jsonl"), "format": "preference"}],
            "val": [{"path": str(rows / f"{part}.jsonl"), "format": "preference"}],
            "max_length": 256,
        },
        "rank": {"init": budget * (2 if method == "dynamic" else 1), "budget": budget},
        "pruning": {"events": 4},
        "train": {
            "objective": "dpo",
            "max_steps": STEPS,
            "micro_batch_size": BATCH,
            "learning_rate": rate,
            "log_steps": STEPS,
        },
        "eval": {"steps": STEPS, "samples": 0},
        "output_dir": str(work / "run"),
        "seed": seed,
    }
    made = api.train(recipe, overwrite=True, progress=None)
    looks = [line for line in made.metrics if line["event"] == "eval"]
    first, last = looks[0], looks[-1]
    numbers = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    record = {
        **key,
        **{number: last[number] for number in numbers},
        "first": {number: first[number] for number in numbers},
        "parameters": made.metrics[-1].get("parameters") or made.summary.get("parameters"),
        "seconds": round(time.time() - started, 1),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def best_rate(name: str, method: str, budget: int, work: Path) -> float:
    """Of factors of 2, with a worse neighbour on both sides."""
    losses: dict[float, float] = {}

    def tried(rate: float) -> float:
        if rate not in losses:
            try:
                losses[rate] = run(name, method, budget, rate, 0, "val", work)["loss"]
            except MeasureError as error:  # a run that diverges is no candidate
                print(f"{name} {method} {budget} at {rate:.1e}: {error}", flush=True)
                losses[rate] = math.inf
        return losses[rate]

    best = FIRST_RATE[name]
    while True:
        lower, here, higher = tried(best / 2), tried(best), tried(2 * best)
        if here <= min(lower, higher):
            return best
        best = best / 2 if lower < higher else 2 * best


def study(work: Path, minutes: float) -> None:
    end = time.time() + 60 * minutes
    for name, budget in CELLS:
        for method in METHODS:
            if time.time() > end:
                print(f"out of time before {name} {budget} {method}", flush=True)
                return
            rate = best_rate(name, method, budget, work)
            found = [run(name, method, budget, rate, seed, "test", work) for seed in SEEDS]
            print(f"{name} {budget} {method:8} rate {rate:.1e}", *(f"{one['loss']:.4f}" for one in found), flush=True)


def table() -> str:
    """What the test rows say, in Markdown."""
    results = [record for record in read_results() if record["part"] == "test"]
    lines = [
        "# DPO at equal size: a fixed rank, and twice the rank pruned to it",
        "",
        "Made by `study.py table` from study.jsonl. Means of three seeds and their standard deviation, on test rows. "
        "`logp` is that of the whole chosen answer, so its fall is what the answer loses in nats; SFT loss on the same "
        "rows rises by just that over its tokens.",
        "",
        "| pairs | rank | method | rate | loss | accuracy | margin | logp chosen | before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, budget in CELLS:
        for method in METHODS:
            rows = [r for r in results if (r["set"], r["budget"], r["method"]) == (name, budget, method)]
            if len(rows) < len(SEEDS):
                continue
            cells = [_spread([row[key] for row in rows]) for key in ("loss", "accuracy", "margin", "logp_chosen")]
            before = f"accuracy {rows[0]['first']['accuracy']:.3f}, logp {rows[0]['first']['logp_chosen']:.2f}"
            lines.append(f"| {name} | {budget} | {method} | {rows[0]['rate']:.1e} | {' | '.join(cells)} | {before} |")
    lines += ["", *_differences(results), ""]
    return "\n".join(lines)


def _differences(results: list[Record]) -> list[str]:
    """Dynamic less fixed, seed by seed."""
    lines = ["| pairs | rank | loss, dynamic - fixed | accuracy | logp chosen |", "|---|---|---|---|---|"]
    for name, budget in CELLS:
        by_seed = {
            method: {r["seed"]: r for r in results if (r["set"], r["budget"], r["method"]) == (name, budget, method)}
            for method in METHODS
        }
        seeds = sorted(by_seed["fixed"].keys() & by_seed["dynamic"].keys())
        if len(seeds) == len(SEEDS):
            parts = [
                _spread([by_seed["dynamic"][seed][key] - by_seed["fixed"][seed][key] for seed in seeds])
                for key in ("loss", "accuracy", "logp_chosen")
            ]
            lines.append(f"| {name} | {budget} | {' | '.join(parts)} |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--work", type=Path, default=Path("/tmp/preference-study"))
    given = parser.parse_args()
    if given.what == "run":
        study(given.work, given.minutes)
    TABLE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
