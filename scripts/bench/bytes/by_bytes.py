"""Loss against bytes: LoRA (stock PEFT) and dynlora, both through the same rounding.

    python scripts/bench/bytes/by_bytes.py run      # train, keep the adapters in the work folder, round and measure them
    python scripts/bench/bytes/by_bytes.py table    # only write by_bytes.md again

Tasks, batches and rates are quality.py's: rates chosen on `val`, losses of the table on `test`. Every run and every
format of it is a line of by_bytes.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS, RANKS, METHODS = ["e2e", "svamp", "chat", "gsm8k"], [1, 2, 4, 8], ["lora", "dynlora"]
CELL = ("task", "method", "budget", "seed")


def measure(run: dict[str, Any], forms: list[str], work: Path) -> None:
    """Round the adapter of a run in every way that is not on file yet, and take its loss on the `test` part."""
    from bytes_forms import through
    from bytes_runs import folder_of
    from quality import read_results
    from quality_methods import Job, lay_ground

    from dynlora_cli.adapters.attach import attached
    from dynlora_cli.adapters.read import read_adapter
    from dynlora_cli.evaluation.held_out_loss import row_sums

    cell = {key: run[key] for key in (*CELL, "rate")}
    done = {r["form"] for r in read_results(RESULTS) if r["what"] == "form" and all(r[k] == cell[k] for k in cell)}
    if not (missing := [form for form in forms if form not in done]):
        return
    job = Job(*(run[key] for key in ("task", "method", "budget", "rate", "seed")))
    adapter, ground = read_adapter(folder_of(job, work)), lay_ground(job, work, [])
    for form in missing:
        started = time.process_time()
        rounded, size = through(adapter, form)
        with attached(ground.base.model, rounded):
            batches = ground.test
            rows = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
            loss = row_sums(ground.base.model, rows).loss
        line = {"what": "form", **cell, "form": form, "bytes": size, "test": round(loss, 5)}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "cpu": round(time.process_time() - started, 1)}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--forms", default="float32,bf16,fp8,nf4,int4,int3,energy3,mixed2.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("out/bytes"))
    options = parser.parse_args()
    if options.stage == "run":
        import torch
        from bytes_runs import rate_of, trained
        from quality_methods import Job

        work = options.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        ranks = [int(rank) for rank in options.ranks.split(",")]
        for seed, rank, task, method in product(range(options.seeds), ranks, options.tasks.split(","), METHODS):
            job = Job(task, method, rank, rate_of(task, method, rank, RESULTS), seed)
            run = trained(job, RESULTS, work)
            measure(run, options.forms.split(","), work)
            print(job, run["loss"], flush=True)
    from bytes_table import page

    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    RESULTS.with_suffix(".md").write_text(page(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
