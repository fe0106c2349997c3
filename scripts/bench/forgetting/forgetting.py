"""What does a fine-tuned adapter forget, per parameter? The rise of the loss on general text beside the gain on the task.

    python scripts/bench/forgetting/forgetting.py run --tasks e2e --ranks 1,4,16 --seeds 2     # what is missing
    python scripts/bench/forgetting/forgetting.py table          # writes forgetting.md and forgetting.svg again

LoRA, rsLoRA and DoRA of stock PEFT and dynlora, over a grid of learning rates, on the tasks, batches and loop of quality.py
with stories3M. General text is what that model was trained on: stories that no task has. A run is a line of
forgetting.jsonl; `val` chooses rates, `test` is what the tables show. Lines of a real model, as scripts/bench/real.py writes
them, are read beside these where they name the loss on general text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RESULTS = HERE / "forgetting.jsonl"
METHODS = ("lora", "rslora", "dora", "dynlora")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # rsLoRA's and large ranks' best lie at the lower end
GENERAL_ROWS, GENERAL_CHARACTERS = 160, 240
Result = dict[str, Any]


def read_results(path: Path = RESULTS) -> list[Result]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def real_results(path: Path = HERE.parent / "real.jsonl") -> list[Result]:
    """Runs of real.py that have the loss on general text."""
    return [line for line in read_results(path) if line.get("general") is not None]


def general_file(work: Path) -> Path:
    """Stories, in rows of plain text as long as quality.py's."""
    from quality_tasks import SHARED

    path = work / "stories.jsonl"
    if not path.exists():
        text = (SHARED / "data" / "tinystories_sample" / "tinystories.txt").read_text(encoding="utf-8")
        text = re.sub(r"\s+", " ", text.replace("<|endoftext|>", " "))
        starts = range(0, len(text) - GENERAL_CHARACTERS, len(text) // GENERAL_ROWS)
        rows = [{"text": text[start : start + GENERAL_CHARACTERS].strip()} for start in list(starts)[:GENERAL_ROWS]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def general_loss(ground: Any, work: Path) -> float:
    """Of the model as it stands, nats per token."""
    from quality_methods import make_batches, read_data

    from dynlora_cli.evaluation.held_out_loss import held_out
    from dynlora_cli.models.base_files import BaseFiles

    path, recipe = general_file(work), ground.recipe
    dataset = recipe.dataset.model_copy(
        update={"val": [source.model_copy(update={"path": str(path)}) for source in recipe.dataset.val]}
    )
    recipe = recipe.model_copy(update={"dataset": dataset})
    rows = read_data(recipe, BaseFiles.find(recipe.model)).val
    batches = make_batches(recipe, rows, ground.base, shuffle=False)
    lines = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
    return held_out(ground.base.model, lines)["loss"]


def run_one(task: str, method: str, rank: int, rate: float, seed: int, work: Path) -> Result:
    """Train once as quality.py does; losses of the task and of general text, before and after."""
    import quality_methods as methods
    import torch

    from dynlora_cli.errors import MeasureError

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    ground = methods.lay_ground(methods.Job(task, method, rank, rate, seed), work, [])
    before = general_loss(ground, work)
    started = time.process_time()
    try:
        found = methods.METHODS[method](methods.Job(task, method, rank, rate, seed), ground)
    except MeasureError:  # diverged
        return {"loss": None, "general_before": before}
    found.pop("ranks", None)
    after = general_loss(ground, work)
    return {**found, "general_before": before, "general": after, "cpu": round(time.process_time() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--tasks", default="e2e")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ranks", default="1,4,16")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=Path("out/forgetting"))
    options = parser.parse_args()
    if options.stage == "run":
        work = options.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.environ.update(TRANSFORMERS_VERBOSITY="error")
        cells = product(
            map(int, options.seeds.split(",")),
            options.tasks.split(","),
            map(int, options.ranks.split(",")),
            map(float, options.rates.split(",")),
            options.methods.split(","),
        )
        for seed, task, rank, rate, method in cells:
            cell = {"task": task, "method": method, "budget": rank, "rate": rate, "seed": seed}
            if any(cell.items() <= line.items() for line in read_results()):
                continue
            line = cell | run_one(task, method, rank, rate, seed, work)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    from forgetting_tables import picture, table

    results = read_results()
    (HERE / "forgetting.md").write_text(table(results, real_results()), encoding="utf-8")
    if drawn := picture(results):
        (HERE / "forgetting.svg").write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
