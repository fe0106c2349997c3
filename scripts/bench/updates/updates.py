"""Constant updates: what does a model forget when it is updated again and again, and what helps?

    python scripts/bench/updates/updates.py rates        # learning rates, on validation rows of one domain; first
    python scripts/bench/updates/updates.py domains      # law, finance, medicine, arithmetic, code; 3 seeds
    python scripts/bench/updates/updates.py tasks        # ten tasks of continual learning, three orders
    python scripts/bench/updates/updates.py real --model FOLDER   # three domains on a real model, such as SmolLM2-135M
    python scripts/bench/updates/updates.py retirement   # what an update that is taken out again leaves behind
    python scripts/bench/updates/updates.py table        # only write updates.md again

A stream is a list of tasks; a method learns one after the other, each in a run of `dynlora train`, and is measured on
the test rows of every task seen so far. All methods end with the same number of parameters: SHARE of average rank for
each task. A stage is a line of updates.jsonl; what is there is not run again. Runs lie in the work folder under a hash
of their settings, so that methods share what they have in common (a first update is the same with and without replay).
Data and models are in DYNLORA_SHARED (../shared).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import updates_retirement
from updates_runs import (
    JOINT,
    METHODS,
    STREAMS,
    Method,
    Record,
    Stream,
    later_settings,
    measure,
    ranks,
    run_settings,
    trained,
)
from updates_tables import page

RESULTS = Path(__file__).with_suffix(".jsonl")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEARCHED_ON = "law"


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
            raise SystemExit("no learning rate yet: python scripts/bench/updates/updates.py rates")
        return float(min(tried, key=lambda line: line["loss"][SEARCHED_ON])["rate"])

    def run(self, job: Job) -> None:
        """All stages of a job."""
        stream, method = job.stream, METHODS[job.method]
        tasks, rate, before = stream.order(job.order), stream.rate or self.rate(method.family), None
        if all(self.has(job.key(stage)) for stage in range(len(tasks))):
            return
        for stage, task in enumerate(tasks):
            settings = run_settings(stream, [task], rate, job.seed, self.work) | ranks(method, stream, stage)
            if before and method.goes_on:
                settings |= later_settings(method, before)
            before = trained(settings, self.work)
            if not self.has(job.key(stage)):
                seen = tasks[: stage + 1] if method.goes_on else [task]
                self.record(job, stage, task, settings["train.learning_rate"], before, seen)

    def joint(self, stream: Stream, seed: int) -> None:
        """All rows at once: what could be had if nothing came later."""
        job, rate = Job(stream, JOINT, 0, seed), self.rate("fixed")
        if not self.has(job.key(0)):
            settings = run_settings(stream, stream.tasks, rate, seed, self.work)
            settings |= ranks(Method(grows=False), stream, 0)
            self.record(job, 0, "all", rate, trained(settings, self.work), stream.tasks)

    def retirement(self, seeds: Sequence[int]) -> None:
        """What a retired update leaves behind."""
        for seed in seeds:
            for method in updates_retirement.KINDS:
                key = ("retirement", method, seed)
                if not any((line["part"], line.get("method"), line.get("seed")) == key for line in self.lines):
                    rate = self.rate(METHODS[method].family)
                    found = updates_retirement.leaves_behind(method, seed, rate, self.work)
                    self.add({"part": "retirement", "method": method, "seed": seed, "rate": rate, **found})

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


def numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", *STREAMS, "retirement", "table"])
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
    if options.what == "retirement":
        bench.retirement(numbers(options.seeds) or STREAMS["domains"].seeds)
        return
    stream = STREAMS[options.what]
    if options.what == "real":
        if not options.model:
            raise SystemExit("real: --model FOLDER")
        stream = replace(stream, model=options.model)
    seeds, orders = numbers(options.seeds) or stream.seeds, numbers(options.orders) or stream.orders
    bench.base(stream)
    for seed in seeds if stream.joint else ():
        bench.joint(stream, seed)
    for job in jobs(stream, [name.strip() for name in options.methods.split(";")], seeds, orders):
        bench.run(job)


if __name__ == "__main__":
    sys.exit(main())
