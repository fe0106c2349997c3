"""Runs of quality.py's tasks at other lengths, budgets and numbers of rows: what a rule for rate, rank or epochs is made from.

    python scripts/bench/auto/measure.py curve e2e,svamp --budget 8 --steps 200 --rates 5e-4,1e-3,2e-3
    python scripts/bench/auto/measure.py curve e2e --budget 8 --steps 200 --set train.learning_rate=auto
    python scripts/bench/auto/measure.py curve e2e --rows 200 --set train.epochs=8 train.max_steps=null

Every run is a line of runs.jsonl: the loss on the `val` part at the end and at each evaluation, that on `test`, the
training loss of the first 60 steps, CPU seconds. What is there is not run again. Tables: tables.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import quality_methods as methods  # noqa: E402 - they are scripts, not a package
import torch  # noqa: E402
from quality_tasks import TASKS, prepare  # noqa: E402

from dynlora_cli.errors import MeasureError  # noqa: E402
from dynlora_cli.evaluation.held_out_loss import row_sums  # noqa: E402
from dynlora_cli.execution.mode import plan  # noqa: E402
from dynlora_cli.models.base_files import BaseFiles  # noqa: E402
from dynlora_cli.training import loop, step  # noqa: E402
from dynlora_cli.training.batches import make_batches  # noqa: E402
from dynlora_cli.training.components import attach  # noqa: E402
from dynlora_cli.training.setup import make_accelerator, make_run, read_base, read_data  # noqa: E402

RUNS = HERE / "runs.jsonl"
TRACE = 60  # steps whose training loss is kept
MODELS = Path(os.environ.get("DYNLORA_REAL_MODELS", Path.home() / ".cache" / "dynlora-models"))
KEY = ("task", "model", "budget", "steps", "rate", "seed", "rows", "settings")
Record = dict[str, Any]


def known(path: Path = RUNS) -> dict[tuple[Any, ...], Record]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {tuple(record[key] for key in KEY): record for record in map(json.loads, lines)}


def first_rows(task: str, rows: int, work: Path) -> Path:
    """The first so many rows of a task's training part; they are in an order of their hashes."""
    path = work / "rows" / f"{task}-{rows}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (prepare(task, work) / "train.jsonl").open(encoding="utf-8") as file:
        path.write_text("".join(line for line, _ in zip(file, range(rows), strict=False)), encoding="utf-8")
    return path


def settings_of(record: Record, work: Path) -> tuple[str, ...]:
    """What a line's keys set in the task's recipe."""
    settings = list(record["settings"].split())
    if record["model"]:
        settings += [f"model.name_or_path={MODELS / record['model']}", "model.dtype=bfloat16"]
    if record["steps"]:
        settings.append(f"train.max_steps={record['steps']}")
    if record["rows"]:
        val = prepare(record["task"], work) / "val.jsonl"
        train = first_rows(record["task"], record["rows"], work)
        settings.append(f"dataset={{train: [{{path: {train}}}], val: [{{path: {val}}}]}}")
    return tuple(settings)


def measure(record: Record, work: Path) -> Record:
    """Train once; `record` has the keys of KEY."""
    settings = settings_of(record, work)
    job = methods.Job(record["task"], "dynlora", record["budget"], record["rate"], record["seed"])
    torch.manual_seed(job.seed)
    recipe = methods.recipe_for(job, work, "val", (*settings, "train.log_steps=1"))
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    modes = plan(recipe.train)
    base = read_base(recipe, files, data, torch.device("cpu"), modes)
    pool, start = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    assert pool is not None
    assert start is not None
    modes.apply(base.model, pool)
    looks = data if "eval." in record["settings"] or record["rows"] else replace(data, val=[])
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    training = make_run(recipe, accelerator, base, looks, pool, start, modes, save=lambda _: None)
    training.samples = ()
    training.control.loss_now = None
    events: list[Record] = []
    training.emit = events.append
    taken, one = [], step._step
    step._step = lambda *arguments: (taken.append(1), one(*arguments))[1]  # those of trials are counted too
    began = time.process_time()
    try:
        loop.fit(training)
    except MeasureError:
        return {"loss": math.inf, "cpu": round(time.process_time() - began, 1)}
    finally:
        step._step = one
    cpu, losses = time.process_time() - began, [e["loss"] for e in events if e["event"] == "train"]
    # Of a real model the last training losses must do, on the same batches at every rate.
    measured = {"loss": round(sum(losses[-8:]) / len(losses[-8:]), 5)}
    if not record["model"] or record["rows"]:
        measured = {"loss": _loss(base.model, make_batches(recipe, data.val, base, shuffle=False))}
    if not record["model"] and not record["rows"]:  # read once, for tables only
        tested = read_data(methods.recipe_for(job, work, "test", settings), files).val
        measured["test"] = _loss(base.model, make_batches(recipe, tested, base, shuffle=False))
    return measured | _account(training, pool, start, events, cpu, len(taken))


def _account(training: Any, pool: Any, start: Any, events: list[Record], cpu: float, taken: int) -> Record:
    """What a run cost and how it went; `taken` counts the steps of trials, too."""
    progress = training.progress
    return {
        "parameters": pool.parameters,
        "cpu": round(cpu, 1),
        "done": progress.step,
        "steps_per_epoch": training.batches.steps_per_epoch,
        "rate_used": progress.learning_rate,
        "rate_from": progress.rate_from,
        "rates_tried": progress.rates_tried,
        "thrown_away": taken - progress.step,
        "average_rank": round(start.rank_of(pool.parameters), 2),
        "trace": [round(e["loss"], 5) for e in events if e["event"] == "train"][:TRACE],
        "evaluations": [[e["step"], round(e["loss"], 5)] for e in events if e["event"] == "eval"],
        "notes": [e["text"] for e in events if e["event"] == "note"],
    }


def _loss(model: Any, batches: Any) -> float:
    rows = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
    return round(float(row_sums(model, rows).loss), 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve"])
    parser.add_argument("tasks")
    parser.add_argument("--budget", default="8")
    parser.add_argument("--steps", type=int, default=0, help="0: by epochs")
    parser.add_argument("--rates", default="0", help="0: what the recipe says, which is auto")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--model", default="", help="a folder of DYNLORA_REAL_MODELS, in place of the task's own")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("out/auto"))
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    budget = int(options.budget) if options.budget.isdigit() else options.budget
    for task in options.tasks.split(","):
        for rate in map(float, options.rates.split(",")):
            for seed in map(int, options.seeds.split(",")):
                steps = options.steps or (0 if options.rows else TASKS[task].steps)
                values = (task, options.model, budget, steps, rate, seed, options.rows, " ".join(options.set))
                record = dict(zip(KEY, values, strict=True))
                if values in known():
                    continue
                record |= measure(record, work)
                with RUNS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print({k: v for k, v in record.items() if k not in ("trace", "ranks", "evaluations")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
