"""Adapters from a description, on forty-nine text tasks of stories3M: what is a hypernetwork worth, and what decides?

    python scripts/bench/generated/text.py tasks        # the base, and a LoRA for each task; first
    python scripts/bench/generated/text.py all          # one LoRA for all tasks, told what to do in its prompt or not
    python scripts/bench/generated/text.py library      # of the LoRAs by task, the one with the nearest description
    python scripts/bench/generated/text.py hypernets --methods "text-gated;text-to-lora L, 64 wide"
    python scripts/bench/generated/text.py table        # only write text.md again

A line of text.jsonl is one method under one condition with one seed: the sums of every task's 48 test rows (loss, targets,
right answers, rows). What is there is not run again. Data and models are in DYNLORA_SHARED (../shared).

Conditions say which texts a method was given for a task:

    own         none: an adapter that was trained on the task, or a model that is told nothing
    seen        two descriptions of it that training could draw
    kept back   the two others; of a held-out task no description was seen
    shuffled    two descriptions of other tasks
    random      words in no order, and a sentence about fog, granite, bicycles or penguins
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import text_baselines as baselines
import text_hypernets as hypernets
import text_tasks
from text_bench import Bench


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "all", "library", "hypernets", "table"])
    parser.add_argument("--ranks", default="46", help="of the LoRA for all tasks")
    parser.add_argument("--methods", default=";".join(hypernets.METHODS), help="with ; between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/text"))
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    bench = Bench(options.work.resolve())
    if options.what != "table":
        text_tasks.make(bench.work / "tasks")
    if options.what == "tasks":
        baselines.base_alone(bench)
        baselines.by_task(bench)
    if options.what == "all":
        for rank in map(int, options.ranks.split(",")):
            for texts in (True, False):
                baselines.for_all(bench, rank, options.seed, texts=texts)
    if options.what == "library":
        baselines.library(bench)
    if options.what == "hypernets":
        for method in options.methods.split(";"):
            hypernets.measure(bench, method, options.seed)
    bench.write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
