"""Streams, methods, and one run of updates.py: how it is trained, where it lies, how it is measured."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from updates_tasks import DOMAINS, SHARED, TASKS, prepare

Settings = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Tasks that come one after the other.

    Attributes:
        general: text that is measured as well and never trained on.
        share: average rank that each task adds to the final size.
        rows: test rows of each task.
        rate: the learning rate of all methods; None: that of the method's family, found on stories3M.
        joint: also train on all rows at once.
    """

    name: str
    tasks: tuple[str, ...]
    general: str
    steps: int
    share: int
    max_length: int
    seeds: tuple[int, ...] = (0,)
    orders: tuple[int, ...] = (0,)
    batch: int = 8
    rows: int = 64
    rate: float | None = None
    joint: bool = True
    model: str = str(SHARED / "models" / "stories3M")

    def order(self, number: int) -> list[str]:
        """The tasks as they stand (0) or shuffled by this number."""
        return random.Random(number).sample(self.tasks, len(self.tasks)) if number else list(self.tasks)


STREAMS = {
    "domains": Stream("domains", DOMAINS, "stories", steps=40, share=2, max_length=160, seeds=(0, 1, 2)),
    "tasks": Stream("tasks", TASKS, "stories", steps=30, share=1, max_length=192, orders=(1, 2, 3)),
    "real": Stream(
        "real",
        ("law", "finance", "arithmetic"),
        "wikitext",
        steps=12,
        share=2,
        max_length=96,
        batch=4,
        rows=12,
        rate=1e-3,
        joint=False,
    ),
}


@dataclass(frozen=True)
class Method:
    """How one update follows another.

    Attributes:
        grows: each update brings components of its own; otherwise all are there from the first update on.
        over: how many times its share an update starts with; what is too much is pruned.
        new: components that a later update begins with beside those of the final size, where methods do not grow.
        goes_on: from the adapter of the update before; otherwise each task has an adapter of its own.
        later: settings of the second update and those after it.
        replay: share of rows of the earlier updates.
    """

    grows: bool
    over: int = 1
    new: int = 0
    goes_on: bool = True
    later: Settings = field(default_factory=dict)
    replay: str = ""

    @property
    def family(self) -> str:
        """Methods of a family have one learning rate."""
        return f"grows {self.over}x" if self.grows else "fixed"


REPLAY = "5%"
METHODS = {
    "sequential": Method(grows=False),
    "sequential, replay 5 %": Method(grows=False, replay=REPLAY),
    "O-LoRA": Method(grows=True, later={"adapter.old": "freeze", "adapter.orthogonality": 0.5}),
    "InfLoRA": Method(
        grows=True,
        later={"adapter.old": "freeze", "adapter.init_weights": "inflora", "adapter.freeze_a": True},
    ),
    "SD-LoRA": Method(grows=True, later={"adapter.old": "magnitudes"}),
    "growth, freeze, unpruned": Method(grows=True, later={"adapter.old": "freeze"}),
    "growth, freeze": Method(grows=True, over=2, later={"adapter.old": "freeze"}),
    "growth, tune": Method(grows=True, over=2),
    "growth, tune, replay 5 %": Method(grows=True, over=2, replay=REPLAY),
    # Attempts at forgetting less than replay does:
    "growth, freeze, replay 5 %": Method(grows=True, over=2, later={"adapter.old": "freeze"}, replay=REPLAY),
    "growth, tune, replay 5 %, half rate": Method(
        grows=True, over=2, later={"train.learning_rate": 2e-3}, replay=REPLAY
    ),
    "growth, freeze, replay 5 %, half rate": Method(
        grows=True, over=2, later={"adapter.old": "freeze", "train.learning_rate": 2e-3}, replay=REPLAY
    ),
    "growth, freeze, replay 20 %, half rate": Method(
        grows=True, over=2, later={"adapter.old": "freeze", "train.learning_rate": 2e-3}, replay="20%"
    ),
    "sequential, replay 20 %": Method(grows=False, replay="20%"),
    "whole size at once, 4 new, tune, replay 5 %": Method(grows=False, new=4, replay=REPLAY),
    "an adapter for each": Method(grows=True, over=2, goes_on=False),
}
JOINT = "joint"  # one run on the rows of all tasks, of as many steps as a stream has in all


# -- one run ---------------------------------------------------------------------------------------------------------


def ranks(method: Method, stream: Stream, stage: int) -> Settings:
    """Components at the start and at the end of an update."""
    if not method.grows:
        whole = stream.share * len(stream.tasks)
        return {"rank.init": whole + (method.new if stage else 0), "rank.budget": whole}
    before = stream.share * stage if method.goes_on else 0
    return {"rank.init": before + method.over * stream.share, "rank.budget": before + stream.share}


def run_settings(stream: Stream, tasks: Sequence[str], rate: float, seed: int, work: Path) -> Settings:
    """What all methods have in common."""
    sources = {
        part: [{"path": str(prepare(task, work) / f"{part}.jsonl")} for task in tasks] for part in ("train", "val")
    }
    return {
        "model.name_or_path": stream.model,
        "dataset.train": sources["train"],
        "dataset.val": sources["val"],
        "dataset.max_length": stream.max_length,
        "dataset.chat": False,
        "train.max_steps": stream.steps * len(tasks),
        "train.micro_batch_size": stream.batch,
        "train.learning_rate": rate,
        "train.save_steps": 1_000_000,
        "eval.max_samples": 8,  # for the run's own report; what counts is measured on the test rows
        "seed": seed,
    }


def later_settings(method: Method, before: Path) -> Settings:
    """What makes an update go on from the one before."""
    replay = {"dataset.replay": {"from": str(before), "share": method.replay}} if method.replay else {}
    return {"adapter.from": str(before), "eval.also": [], **method.later, **replay}  # also: measured here anyway


def trained(settings: Settings, work: Path) -> Path:
    """The folder of the run with these settings, which is trained if it is not there."""
    from dynlora_cli.commands.train import run
    from dynlora_cli.config.load import load_recipe

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder, blank = work / "runs" / digest, work / "blank.yaml"
    if (folder / "took.json").exists():
        return folder
    if not blank.exists():
        blank.write_text("model: builtin:tiny\ndataset: none.jsonl\n", encoding="utf-8")
    started = time.monotonic()
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    summary = run(load_recipe(blank, overrides, str(folder)), overwrite=True)
    took = {"seconds": round(time.monotonic() - started, 1), "parameters": summary["parameters"]}
    (folder / "took.json").write_text(json.dumps(took), encoding="utf-8")
    return folder


# -- measuring -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def base_of(stream: Stream, work: Path) -> Any:
    import torch

    from dynlora_cli.execution.mode import plan
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.training.setup import read_base, read_data

    recipe = measuring_recipe(stream, stream.general, "test", work)
    files = BaseFiles.find(recipe.model)
    base = read_base(recipe, files, read_data(recipe, files), torch.device("cpu"), plan(recipe.train))
    base.model.requires_grad_(False)
    return base


def measuring_recipe(stream: Stream, task: str, part: str, work: Path) -> Any:
    from dynlora_cli.config.load import load_recipe

    settings = run_settings(stream, [task], 1e-3, 0, work)
    folder = prepare(task, work)
    settings |= {"dataset.val": [{"path": str(folder / f"{part}.jsonl")}]}
    return load_recipe(work / "blank.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])


@lru_cache(maxsize=64)
def rows_of(stream: Stream, task: str, part: str, work: Path) -> list[Any]:
    """The rows of a part as batches."""
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.training.batches import make_batches
    from dynlora_cli.training.setup import read_data

    recipe = measuring_recipe(stream, task, part, work)
    data = read_data(recipe, BaseFiles.find(recipe.model))
    batches = make_batches(recipe, data.val[: stream.rows], base_of(stream, work), shuffle=False)
    return [batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index)]


def measure(stream: Stream, adapter: Path | None, tasks: Sequence[str], work: Path, part: str = "test") -> Record:
    """Loss in nats per target, and the share of rows whose whole answer is what greedy decoding gives, by task.

    The token that ends a text is left out: stories3M has never seen it, and learns it so slowly that it would be most of
    the loss of an answer of one word.
    """
    from contextlib import nullcontext

    from dynlora_cli.adapters.attach import attached
    from dynlora_cli.adapters.read import read_adapter

    base, found = base_of(stream, work), Record(loss={}, exact={})
    with attached(base.model, read_adapter(adapter)) if adapter else nullcontext():
        for task in tasks:
            loss, right = answers(base.model, rows_of(stream, task, part, work), int(base.tokenizer.eos_token_id))
            found["loss"][task], found["exact"][task] = round(loss, 5), round(right, 4)
    return found


def answers(model: Any, batches: Sequence[Any], end: int) -> tuple[float, float]:
    """The mean loss of all targets but `end`, and the share of rows of which each of them was the first choice."""
    from dynlora_cli.tasks.loss import evaluating, judged

    total, targets, right = 0.0, 0, []
    with evaluating(model):
        for batch in batches:
            loss_N, choice_N, target_N, line_N = judged(model, batch)
            told_N = target_N != end
            total, targets = total + float(loss_N[told_N].sum()), targets + int(told_N.sum())
            wrong = set(line_N[told_N & (choice_N != target_N)].tolist())
            right += [line not in wrong for line in range(len(batch.labels))]
    return total / targets, sum(right) / len(right)
