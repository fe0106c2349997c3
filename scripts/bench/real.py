"""Out of the box, on a real model: `dynlora train` with nothing set, what others ship, and the best of a sweep.

    python scripts/bench/real.py run --tasks e2e,gsm8k                  # everything, the most telling first
    python scripts/bench/real.py run --tasks e2e --methods lora,dora,dynlora --ranks 1,4,16 --keep adapters
    python scripts/bench/real.py table                                  # REAL.md and real.svg from real.jsonl

    python scripts/bench/real.py run --tasks rows.jsonl --results mine/real.jsonl       # rows of your own

Needs SmolLM2-135M-Instruct as a folder in DYNLORA_REAL_MODELS (~/.cache/dynlora-models), or another model, whose folder
DYNLORA_REAL_MODEL names; its lines go into a file of their own. Our tasks lie in DYNLORA_SHARED (../shared).
Every run sees the same rows once, in the same order (by seed), but `dynlora` with nothing set chooses how often, and
`+stretched` runs take as many CPU seconds as that. A method with a rank gets its rate from a grid of factors
of 2 that is extended until the best on `val` is inside; `--rates auto` leaves it to `dynlora`. Every run is a line of
real.jsonl, with CPU seconds of loading, training, and of ours the search for the rate; what is there is not run again, so
that the command can be stopped and started at will. `test` is read in the same go and used for tables alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality import climb

HERE = Path(__file__)
SWEEP, OUR_BUDGET = (16, 4, 64), 8
FIRST_RATE = {4: 3.2e-3, 16: 1.6e-3, 64: 1.6e-3}
ONE_PASS = "dynlora train.epochs=1"  # a run with nothing set sees rows two to four times
CELL = ("task", "method", "rank", "seed")
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Bench:
    """The runs: those in the file, and those that are asked for."""

    def __init__(self, results: Path, work: Path, keep: Path | None, label: str) -> None:
        self.results, self.work, self.keep, self.label = results, work, keep, label

    def record(
        self,
        task: str,
        method: str,
        rank: int,
        rate: float,
        seed: int,
        *,
        stretch: float = 1.0,
        beat: float = math.inf,
    ) -> Record:
        """The line of a run, from the file or by running it; see `run` for `beat`."""
        from real_methods import MODEL, Job, is_ours, run
        from real_tables import MODEL as USUAL

        if is_ours(method) and self.label:
            method = f"{method}@{self.label}"
        job = Job(task, method, rank, rate, seed, stretch=stretch)
        for line in read(self.results):
            same = Job(*(line[k] for k in ("task", "method", "rank", "rate", "seed"))).key == job.key
            if same and line.get("model", USUAL) == MODEL.name and not self._lost(job):
                return line
        line = {"task": task, "method": method, "rank": rank, "rate": rate, "seed": seed}
        line |= run(job, self.work, self.keep, beat)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{task:12} {method:20} rank {rank:2}  rate {rate:.1e}  seed {seed}  {line['loss']:.4f}", flush=True)
        return line

    def _lost(self, job: Any) -> bool:
        return self.keep is not None and not (self.keep / job.name).is_dir()

    def tuned(self, task: str, method: str, rank: int, seeds: int) -> Record:
        """The best rate on seed 0, and the other seeds with it."""
        lines = [r for r in read(self.results) if [r[k] for k in CELL] == [task, method, rank, 0]]
        tried = {r["rate"]: r["loss"] for r in lines if r["rate"]}

        def loss_at(rate: float) -> float:
            line = self.record(task, method, rank, rate, 0, beat=min(tried.values(), default=math.inf))
            tried[rate] = float(line["loss"])
            return tried[rate]

        first = min(tried, key=tried.__getitem__, default=FIRST_RATE.get(rank, 1.6e-3))
        best = climb(loss_at, first, finer=False)
        for seed in range(1, seeds):
            self.record(task, method, rank, best, seed)
        return self.record(task, method, rank, best, 0)

    def stretched(self, task: str, method: str, seed: int, rank: int = 0, rate: float = 0.0) -> None:
        """Another method for as many CPU seconds as ours took, all in all."""
        lines = [r for r in read(self.results) if (r["task"], r["seed"]) == (task, seed)]
        ours = next((r for r in lines if (r["method"], r["rank"]) == ("dynlora", 0)), None)
        own = next((r for r in lines if (r["method"], r["rank"], r["rate"]) == (method, rank, rate)), None)
        if not (ours and own):
            print(
                f"{task}: {method} cannot be stretched: it, or dynlora with nothing set, is not there yet", flush=True
            )
        else:
            stretch = (ours["cpu_total"] - own["cpu_load"]) / own["cpu_train"]
            self.record(task, f"{method}+stretched", rank, rate, seed, stretch=stretch)


def everything(bench: Bench, task: str, seeds: int) -> None:
    """All methods on a task, the most telling first."""
    from real_tools import OUR_BATCH, TOOLS, needs_our_batch

    for seed in range(seeds):
        bench.record(task, "dynlora", 0, 0.0, seed)
        bench.record(task, ONE_PASS, 0, 0.0, seed)
        for name in TOOLS:
            bench.record(task, name, 0, 0.0, seed)
        if seed == 0:
            best = min((bench.tuned(task, "lora", rank, 1) for rank in SWEEP), key=lambda line: float(line["loss"]))
            bench.stretched(task, "lora", seed, best["rank"], best["rate"])
        for name in filter(needs_our_batch, TOOLS):
            bench.record(task, name + OUR_BATCH, 0, 0.0, seed)
        bench.record(task, ONE_PASS, 16, 0.0, seed)
        bench.record(task, "dynlora-auto", 0, 0.0, seed)
        for name in best_tools(read(bench.results), task, seed)[:3]:
            bench.stretched(task, name, seed)
    bench.tuned(task, "lora", OUR_BUDGET, seeds)
    best = min((bench.tuned(task, "lora", rank, 1) for rank in SWEEP), key=lambda line: float(line["loss"]))
    bench.tuned(task, "lora", best["rank"], seeds)


def best_tools(records: Sequence[Record], task: str, seed: int) -> list[str]:
    """Shipped defaults, as shipped or with our batch, the lowest `val` loss first."""
    from real_tools import OUR_BATCH, TOOLS

    lines = [
        r for r in records if (r["task"], r["seed"]) == (task, seed) and r["method"].removesuffix(OUR_BATCH) in TOOLS
    ]
    return [r["method"] for r in sorted(lines, key=lambda r: r["loss"])]


def asked(bench: Bench, task: str, methods: Sequence[str], ranks: Sequence[int], rates: str, seeds: int) -> None:
    """These methods at these ranks; with rates from the grid where the method needs one."""
    from real_methods import SWEPT
    from real_tables import best_of, sweep

    for method in methods:
        if method.endswith("+stretched"):
            plain = method.removesuffix("+stretched")
            best = best_of(sweep(read(bench.results), task)) if plain == "lora" else {"rank": 0, "rate": 0.0}
            for seed in range(seeds) if best else ():
                bench.stretched(task, plain, seed, best["rank"], best["rate"])
        elif method in SWEPT or (method == "dynlora" and rates == "grid"):
            for rank in ranks:
                bench.tuned(task, method, rank, seeds)
        else:
            for rank in ranks if method.split()[0] == "dynlora" else (0,):
                for seed in range(seeds):
                    bench.record(task, method, rank, 0.0, seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--tasks", default="e2e,gsm8k,dolly,chat,legal,shakespeare")
    parser.add_argument("--methods", default="", help="none: all of them")
    parser.add_argument("--ranks", default="1,4,16", help="of lora, rslora, dora; of dynlora, 0 is as it comes")
    parser.add_argument("--rates", choices=["auto", "grid"], default="auto", help="of dynlora")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--label", default="", help="of this state of the code: ours are called dynlora@LABEL")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the adapters; a run whose adapter is not there is done again"
    )
    parser.add_argument("--work", type=Path, default=Path("out/real"))
    parser.add_argument("--results", type=Path, default=HERE.with_suffix(".jsonl"))
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    if options.stage == "run":
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        bench = Bench(options.results, options.work.resolve(), options.keep, options.label)
        for task in options.tasks.split(","):
            if options.methods:
                ranks = [int(rank) for rank in options.ranks.split(",")]
                asked(bench, task, options.methods.split(","), ranks, options.rates, options.seeds)
            else:
                everything(bench, task, options.seeds)
    else:
        from real_tables import write_tables

        write_tables(read(options.results), options.results.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
