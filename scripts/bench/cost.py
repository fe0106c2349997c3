"""What does finding the rank cost? Pairs of runs: ours from twice the budget down to it, and plain LoRA of the budget.

    python scripts/bench/cost.py                 # 5 pairs at each budget, appended to cost.jsonl, table to stdout
    python scripts/bench/cost.py --table         # only the table of what is there

Both are `dynlora train` on the Llama of hidden size 512 of shrink.py, same rows, steps and rate, one right after the
other, the order changing from pair to pair. "training" is the loop with its events, as the run's own summary has it; "command" is the
whole process, which starts up and evaluates too. Rows are packed: every step has the same number of tokens. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shrink import make_model

RESULTS = Path(__file__).with_suffix(".jsonl")
BUDGETS = (4, 16)
RECIPE = """
model: {name_or_path: MODEL}
dataset: {train: [{path: builtin:stdlib-docs}], max_length: 128, packing: true}
rank: {budget: BUDGET}
train: {micro_batch_size: 4, max_steps: STEPS, learning_rate: 1.0e-3}
eval: {max_samples: 8}
output_dir: OUT
"""


def train(work: Path, budget: int, steps: int, *overrides: str) -> dict[str, float]:
    """One command: seconds of its loop, and of all of it, and the peak of its resident memory in bytes."""
    recipe, out = work / "recipe.yaml", work / "out"
    values = {"MODEL": work / "model", "BUDGET": budget, "STEPS": steps, "OUT": out}
    text = RECIPE
    for key, value in values.items():
        text = text.replace(key, str(value))
    recipe.write_text(text)
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), "--overwrite", "--json", *sets]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    summary, command_seconds = json.loads(done.stdout), time.perf_counter() - started
    return {"training": summary["seconds"], "command": command_seconds, "peak": summary["peak_memory_bytes"]}


def pair(work: Path, budget: int, steps: int, number: int) -> dict[str, Any]:
    runs = {"dynlora": (), "plain": (f"rank.init={budget}",)}
    order = list(runs)[:: -1 if number % 2 else 1]
    found = {name: train(work, budget, steps, *runs[name]) for name in order}
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"budget": budget, "steps": steps, **facts, **found}


def table() -> str:
    pairs = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = ["| budget | steps | pairs | training: ours / plain | command: ours / plain |", "|---|---|---|---|---|"]
    for budget, steps in sorted({(p["budget"], p["steps"]) for p in pairs}):
        here = [p for p in pairs if (p["budget"], p["steps"]) == (budget, steps)]
        cells = []
        for key in ("training", "command"):
            ratios = [p["dynlora"][key] / p["plain"][key] for p in here]
            cells.append(f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append(f"| {budget} | {steps} | {len(here)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            make_model(work / "model")
            train(work, BUDGETS[0], 2)  # the first command of a machine reads files that later ones find in memory
            for number in range(args.pairs):
                for budget in BUDGETS:
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(pair(work, budget, args.steps, number)) + "\n")
    print(table())


if __name__ == "__main__":
    main()
