"""Loss against bytes: LoRA (stock PEFT) and dynlora, both through the same rounding.

python scripts/bench/bytes/by_bytes.py train      # adapters of both at ranks 1, 2, 4, 8; kept in the work folder
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from bytes_runs import rate_of, trained
from quality_methods import Job

RESULTS = Path(__file__).with_suffix(".jsonl")
TASKS, RANKS, METHODS = ["e2e", "svamp", "chat", "gsm8k"], [1, 2, 4, 8], ["lora", "dynlora"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("out/bytes"))
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed, rank, task, method in product(range(options.seeds), RANKS, TASKS, METHODS):
        job = Job(task, method, rank, rate_of(task, method, rank, RESULTS), seed)
        print(job, trained(job, RESULTS, work)["loss"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
