"""The runs of by_bytes.py: quality.py's, whose adapters are kept, in fp32 as they were trained.

LoRA is stock PEFT, saved by PEFT. Rates are those that quality.py has chosen (`val` part, seed 0); a cell that it has
not is searched here in the same way.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from quality import RESULTS as QUALITY
from quality import read_results
from quality_methods import Ground, Job, _train_rival, _wrap, lay_ground, lora_config

from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.adapters.write import write_pool
from dynlora_cli.errors import MeasureError
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.execution.mode import plan
from dynlora_cli.files.whole import whole_folder
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.training import loop
from dynlora_cli.training.components import attach
from dynlora_cli.training.setup import make_accelerator, make_run

Record = dict[str, Any]


def rate_of(task: str, method: str, rank: int, results: Path) -> float:
    """The best rate on seed 0 by `val` loss, of quality.py's grid or of runs here.

    A cell that has neither takes over the rate of the ranks around it: their geometric mean, or the rate of half the
    rank by sqrt 2. That is no advantage for the cell.
    """
    runs = [*read_results(QUALITY), *(r for r in read_results(results) if r["what"] == "run")]
    of_rank: dict[int, dict[float, float]] = {}
    for record in runs:
        if (record["task"], record["method"], record["seed"]) == (task, method, 0):
            of_rank.setdefault(record["budget"], {}).setdefault(round(record["rate"], 6), record["loss"])
    best = {budget: min(losses, key=lambda rate: losses[rate]) for budget, losses in of_rank.items()}
    if rank in best:
        return best[rank]
    if 2 * rank in best:
        return math.sqrt(best[rank // 2] * best[2 * rank])
    return best[rank // 2] / math.sqrt(2)


def folder_of(job: Job, work: Path) -> Path:
    """Where the adapter of a run is kept."""
    return work / "adapters" / f"{job.task}-{job.method}-{job.budget}-{job.rate:.3e}-{job.seed}"


def _fit(ground: Ground, pool: Pool, start: Start) -> None:
    """A run of ours, as quality.py has it, but without its measurements."""
    recipe, modes = ground.recipe, plan(ground.recipe.train)
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    modes.apply(ground.base.model, pool)
    unmeasured = replace(ground.data, val=[])
    training = make_run(recipe, accelerator, ground.base, unmeasured, pool, start, modes, save=lambda _: None)
    training.control.loss_now = None
    loop.fit(training)


def trained(job: Job, results: Path, work: Path) -> Record:
    """The line of a run; trained now, where it is not there."""
    for record in read_results(results):
        if record["what"] == "run" and Job(*(record[key] for key in job.__dict__)).key == job.key:
            return record
    started = time.process_time()
    torch.manual_seed(job.seed)
    ground = lay_ground(job, work, [])
    folder = folder_of(job, work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(folder) as temporary:
            if job.method == "lora":
                model, _ = _wrap(job, ground, lora_config, job.budget)
                _train_rival(model, ground)
                model.save_pretrained(temporary)
                parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            else:
                pool, start = attach(ground.base, ground.recipe.adapter, ground.recipe.rank, job.seed)
                _fit(ground, pool, start)
                model, parameters = ground.base.model, pool.parameters
                write_pool(
                    pool, temporary, kind=PLAIN, model_type=model.config.model_type,
                    base_model=ground.base.files.reference, revision=None, task="causal-lm", whole={},
                )  # fmt: skip
        batches = ground.val
        rows = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
        loss = row_sums(model, rows).loss
    except MeasureError:  # diverged; a learning rate too far
        loss, parameters = math.inf, 0
    record = {"what": "run", **job.__dict__, "parameters": parameters, "loss": round(loss, 5)}
    record["cpu"] = round(time.process_time() - started, 1)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record
