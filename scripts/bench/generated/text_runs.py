"""One run of text.py: its settings, its folder, and how good a model is on the rows of the tasks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from text_tasks import LONGEST, MODEL

Settings = dict[str, Any]
Record = dict[str, Any]
BATCH = 8
MEASURED_BATCH = 24
RANK = 8  # of every adapter that is generated, and of those trained on one task


class Sums(NamedTuple):
    """Over the rows of a task: loss in nats, targets, rows whose whole answer greedy decoding gives, rows."""

    loss: float
    targets: int
    right: int
    rows: int

    def __add__(self, other: object) -> Sums:
        assert isinstance(other, Sums)
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def means(self) -> tuple[float, float]:
        """Nats per target, share of right answers."""
        return round(self.loss / self.targets, 4), round(self.right / self.rows, 4)


def run_settings(sources: Sequence[Settings], steps: int, rate: float, seed: int) -> Settings:
    """What all runs have in common; none looks at rows that are held out while it trains."""
    return {
        "model.name_or_path": str(MODEL),
        "dataset.train": list(sources),
        "dataset.val_size": 0,
        "dataset.max_length": LONGEST,
        "dataset.chat": False,
        "train.max_steps": steps,
        "train.micro_batch_size": BATCH,
        "train.learning_rate": rate,
        "train.save_steps": 1_000_000,
        "eval.samples": 0,
        "seed": seed,
    }


def lora(rank: int) -> Settings:
    """Plain LoRA of one size from the first step to the last."""
    return {"rank.init": rank, "rank.budget": rank}


def trained(settings: Settings, work: Path) -> Path:
    """The folder of the run with these settings, which is trained if it is not there."""
    from dynlora_cli.commands.train import run
    from dynlora_cli.config.load import load_recipe

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = work / "runs" / digest
    if (folder / "took.json").exists():
        return folder
    started, cpu = time.monotonic(), time.process_time()
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    summary = run(load_recipe(blank(work), overrides, str(folder)), overwrite=True)
    took = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
        "parameters": summary["parameters"],
    }
    (folder / "took.json").write_text(json.dumps(took), encoding="utf-8")
    return folder


def took(folder: Path) -> Record:
    found: Record = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    return found


def blank(work: Path) -> Path:
    """A recipe of which everything is set by overrides."""
    path = work / "blank.yaml"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        path.write_text("model: builtin:tiny\ndataset: none.jsonl\n", encoding="utf-8")
    return path


# -- measuring ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def base(work: Path) -> Any:
    """The frozen base, loaded once."""
    import torch

    from dynlora_cli.execution.mode import plan
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.training.setup import read_base, read_data

    recipe = _recipe(work / "tasks" / "copy" / "test.jsonl", work)
    files = BaseFiles.find(recipe.model)
    found = read_base(recipe, files, read_data(recipe, files), torch.device("cpu"), plan(recipe.train))
    found.model.requires_grad_(False)
    return found


def _recipe(rows: Path, work: Path) -> Any:
    from dynlora_cli.config.load import load_recipe

    settings = run_settings([{"path": str(rows)}], 1, 1e-3, 0) | {"train.micro_batch_size": MEASURED_BATCH}
    settings["dataset.max_length"] = 2 * LONGEST  # with a description before it
    return load_recipe(blank(work), [f"{key}={json.dumps(value)}" for key, value in settings.items()])


@lru_cache(maxsize=512)
def batches(rows: Path, work: Path) -> list[Any]:
    """The rows of a file, longest last, as batches."""
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.training.batches import make_batches
    from dynlora_cli.training.setup import read_data

    recipe = _recipe(rows, work)
    data = read_data(recipe, BaseFiles.find(recipe.model))
    made = make_batches(recipe, data.train, base(work), shuffle=False)
    return [batch for index in range(made.steps_per_epoch) for batch in made.step(0, index)]


def answers(model: Any, parts: Iterable[Any], end: int) -> Sums:
    """What a model does on the rows of batches.

    Args:
        model: the base, with what is on it.
        parts: batches.
        end: the token that ends a text, which does not count.
    """
    from dynlora_cli.tasks.loss import evaluating, judged

    total, targets, right, rows = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in parts:
            loss_N, choice_N, target_N, line_N = judged(model, batch)
            told_N = target_N != end
            total, targets = total + float(loss_N[told_N].sum()), targets + int(told_N.sum())
            wrong = set(line_N[told_N & (choice_N != target_N)].tolist())
            rows, right = rows + len(batch.labels), right + len(batch.labels) - len(wrong)
    return Sums(total, targets, right, rows)


def score(rows: Path, work: Path, adapter: Any = None) -> Sums:
    """`answers` of the base on the rows of a file; with an adapter, as adapters/read.py has it, if there is one."""
    from dynlora_cli.adapters.attach import attached

    with attached(base(work).model, adapter) if adapter else nullcontext():
        return answers(base(work).model, batches(rows, work), int(base(work).tokenizer.eos_token_id))
