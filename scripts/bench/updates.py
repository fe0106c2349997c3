"""Constant updates: what does a model forget when it is updated again and again, and what helps?

    python scripts/bench/updates.py rates        # learning rates, on validation rows of one domain; first
    python scripts/bench/updates.py domains      # law, finance, medicine, arithmetic, code; 3 seeds
    python scripts/bench/updates.py tasks        # ten tasks of continual learning, three orders
    python scripts/bench/updates.py real --model FOLDER   # three domains on a real model, such as SmolLM2-135M
    python scripts/bench/updates.py table        # only write updates.md again

A stream is a list of tasks; a method learns one after the other, each in a run of `dynlora train`, and is measured on
the test rows of every task seen so far. All methods end with the same number of parameters: SHARE of average rank for
each task. A stage is a line of updates.jsonl; what is there is not run again. Runs lie in the work folder under a hash
of their settings, so that methods share what they have in common (a first update is the same with and without replay).
Data and models are in DYNLORA_SHARED (../shared).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from updates_tables import page
from updates_tasks import DOMAINS, SHARED, TASKS, prepare

RESULTS = Path(__file__).with_suffix(".jsonl")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEARCHED_ON = "law"
Settings = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Tasks that come one after the other.

    Attributes:
        general: text that is measured as well and never trained on.
        share: average rank that each task adds to the final size.
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
    model: str = str(SHARED / "models" / "stories3M")

    def order(self, number: int) -> list[str]:
        """The tasks as they stand (0) or shuffled by this number."""
        return random.Random(number).sample(self.tasks, len(self.tasks)) if number else list(self.tasks)


STREAMS = {
    "domains": Stream("domains", DOMAINS, "stories", steps=40, share=2, max_length=160, seeds=(0, 1, 2)),
    "tasks": Stream("tasks", TASKS, "stories", steps=30, share=1, max_length=192, orders=(1, 2, 3)),
    "real": Stream("real", ("law", "finance", "arithmetic"), "wikitext", steps=25, share=2, max_length=96),
}


@dataclass(frozen=True)
class Method:
    """How one update follows another.

    Attributes:
        grows: each update brings components of its own; otherwise all are there from the first update on.
        over: how many times its share an update starts with; what is too much is pruned.
        goes_on: from the adapter of the update before; otherwise each task has an adapter of its own.
        later: settings of the second update and those after it.
        replay: share of rows of the earlier updates.
    """

    grows: bool
    over: int = 1
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
    "growth, freeze": Method(grows=True, over=2, later={"adapter.old": "freeze"}),
    "growth, tune": Method(grows=True, over=2),
    "growth, tune, replay 5 %": Method(grows=True, over=2, replay=REPLAY),
    "an adapter for each": Method(grows=True, over=2, goes_on=False),
}
JOINT = "joint"  # one run on the rows of all tasks, of as many steps as a stream has in all


# -- one run ---------------------------------------------------------------------------------------------------------


def ranks(method: Method, stream: Stream, stage: int) -> Settings:
    """Components at the start and at the end of an update."""
    if not method.grows:
        whole = stream.share * len(stream.tasks)
        return {"rank.init": whole, "rank.budget": whole}
    before = stream.share * stage if method.goes_on else 0
    return {"rank.init": before + method.over * stream.share, "rank.budget": before + stream.share}


def run_settings(stream: Stream, tasks: Sequence[str], rate: float, seed: int, work: Path) -> Settings:
    """What all methods have in common."""
    sources = {part: [{"path": str(prepare(task, work) / f"{part}.jsonl")} for task in tasks] for part in ("train", "val")}
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
    return {"adapter.from": str(before), **method.later, **replay}


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

    recipe = test_recipe(stream, stream.general, "test", work)
    files = BaseFiles.find(recipe.model)
    base = read_base(recipe, files, read_data(recipe, files), torch.device("cpu"), plan(recipe.train))
    base.model.requires_grad_(False)
    return base


def test_recipe(stream: Stream, task: str, part: str, work: Path) -> Any:
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

    recipe = test_recipe(stream, task, part, work)
    data = read_data(recipe, BaseFiles.find(recipe.model))
    batches = make_batches(recipe, data.val, base_of(stream, work), shuffle=False)
    return [batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index)]


def measure(stream: Stream, adapter: Path | None, tasks: Sequence[str], work: Path, part: str = "test") -> Record:
    """Loss in nats per target, and the share of rows whose whole answer is what greedy decoding gives, by task."""
    from contextlib import nullcontext

    from dynlora_cli.adapters.attach import attached
    from dynlora_cli.adapters.read import read_adapter
    from dynlora_cli.evaluation.held_out_loss import row_sums

    model = base_of(stream, work).model
    found: Record = {"loss": {}, "exact": {}}
    with attached(model, read_adapter(adapter)) if adapter else nullcontext():
        for task in tasks:
            sums = row_sums(model, rows_of(stream, task, part, work))
            found["loss"][task] = round(sums.loss, 5)
            found["exact"][task] = round(float((sums.correct_R == sums.targets_R).mean()), 4)
    return found


# -- streams ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A method on a stream in one order with one seed."""

    stream: Stream
    method: str
    order: int
    seed: int

    def key(self, stage: int) -> tuple[Any, ...]:
        return (self.stream.name, self.method, self.order, self.seed, stage)


class Bench:
    """Runs what is not in updates.jsonl yet, and appends it."""

    def __init__(self, work: Path, results: Path) -> None:
        (work / "data").mkdir(parents=True, exist_ok=True)
        (work / "blank.yaml").write_text("model: builtin:tiny\ndataset: none.jsonl\n", encoding="utf-8")
        self.work, self.results, self.lines = work, results, read_lines(results)

    def add(self, line: Record) -> None:
        line |= {"date": time.strftime("%Y-%m-%d")}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        print(json.dumps(line), flush=True)

    def has(self, key: tuple[Any, ...]) -> bool:
        names = ("stream", "method", "order", "seed", "stage")
        return any(tuple(line.get(name) for name in names) == key for line in self.lines)

    def search(self) -> None:
        """The learning rate of each family: the lowest loss on the validation rows of the first update of a stream."""
        stream = STREAMS["domains"]
        for family, method in {method.family: method for method in METHODS.values()}.items():
            for rate in RATES:
                if any(line.get("family") == family and line["rate"] == rate for line in self.lines):
                    continue
                settings = run_settings(stream, [SEARCHED_ON], rate, 0, self.work) | ranks(method, stream, 0)
                found = measure(stream, trained(settings, self.work), [SEARCHED_ON], self.work, "val")
                self.add({"part": "rate", "family": family, "rate": rate, "loss": found["loss"]})

    def rate(self, family: str) -> float:
        tried = [line for line in self.lines if line.get("family") == family]
        if not tried:
            raise SystemExit("no learning rate yet: python scripts/bench/updates.py rates")
        return float(min(tried, key=lambda line: line["loss"][SEARCHED_ON])["rate"])

    def run(self, job: Job) -> None:
        """All stages of a job."""
        stream, method = job.stream, METHODS[job.method]
        tasks, rate, before = stream.order(job.order), self.rate(method.family), None
        if all(self.has(job.key(stage)) for stage in range(len(tasks))):
            return
        for stage, task in enumerate(tasks):
            settings = run_settings(stream, [task], rate, job.seed, self.work) | ranks(method, stream, stage)
            if before and method.goes_on:
                settings |= later_settings(method, before)
            before = trained(settings, self.work)
            if not self.has(job.key(stage)):
                seen = tasks[: stage + 1] if method.goes_on else [task]
                self.record(job, stage, task, rate, before, seen)

    def joint(self, stream: Stream, seed: int) -> None:
        """All rows at once: what could be had if nothing came later."""
        job, rate = Job(stream, JOINT, 0, seed), self.rate("fixed")
        if not self.has(job.key(0)):
            settings = run_settings(stream, stream.tasks, rate, seed, self.work)
            settings |= ranks(Method(grows=False), stream, 0)
            self.record(job, 0, "all", rate, trained(settings, self.work), stream.tasks)

    def base(self, stream: Stream) -> None:
        """The model without an adapter."""
        job = Job(stream, "base", 0, 0)
        if not self.has(job.key(0)):
            self.record(job, 0, "", 0.0, None, stream.tasks)

    def record(self, job: Job, stage: int, task: str, rate: float, folder: Path | None, seen: Sequence[str]) -> None:
        found = measure(job.stream, folder, [*seen, job.stream.general], self.work)
        took = json.loads((folder / "took.json").read_text()) if folder else {"parameters": 0}
        key = dict(zip(("stream", "method", "order", "seed", "stage"), job.key(stage), strict=True))
        self.add({"part": "stage", **key, "task": task, "rate": rate, **took, **found})


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def jobs(stream: Stream, methods: Sequence[str], seeds: Sequence[int], orders: Sequence[int]) -> Iterator[Job]:
    """Every seed and order; an adapter for each task knows no order."""
    for order in orders:
        for seed in seeds:
            for method in methods:
                if METHODS[method].goes_on or order == orders[0]:
                    yield Job(stream, method, order, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", *STREAMS, "table"])
    parser.add_argument("--methods", help="separated by semicolons", default="; ".join(METHODS))
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument("--orders", help="such as 1,2")
    parser.add_argument("--model", help="folder of the real model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("out/updates"))
    options = parser.parse_args()
    if options.what != "table":
        measure_all(options, Bench(options.work.resolve(), options.results))
    lines = read_lines(options.results)
    options.results.with_suffix(".md").write_text(page(lines, STREAMS, METHODS), encoding="utf-8")
    return 0


def measure_all(options: argparse.Namespace, bench: Bench) -> None:
    if options.what == "rates":
        bench.search()
        return
    stream = STREAMS[options.what]
    if options.what == "real":
        if not options.model:
            raise SystemExit("real: --model FOLDER")
        stream = replace(stream, model=options.model)
    numbers = partial(map, int)
    seeds = list(numbers(options.seeds.split(","))) if options.seeds else list(stream.seeds)
    orders = list(numbers(options.orders.split(","))) if options.orders else list(stream.orders)
    bench.base(stream)
    for seed in seeds:
        bench.joint(stream, seed)
    for job in jobs(stream, [name.strip() for name in options.methods.split(";")], seeds, orders):
        bench.run(job)


if __name__ == "__main__":
    sys.exit(main())
