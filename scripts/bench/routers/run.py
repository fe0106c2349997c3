"""Which routers are worth using? Losses and choices of each router on the test rows of eight tasks.

    python scripts/bench/routers/run.py --work FOLDER                     # what is missing in routers.jsonl, then routers.md
    python scripts/bench/routers/run.py --work FOLDER --seeds 0 --routers likelihood,arrow
    python scripts/bench/routers/run.py --work FOLDER --model FOLDER      # another model
    python scripts/bench/routers/run.py --table                           # only writes routers.md again

make.py makes what is measured here. A router sees the prompt alone; one that decides by token sees each token as it comes.
Settings of a router: `alone` with its own rule on "none of them", `guarded` by the threshold of the library's calibration.
Parts: `all` eight adapters; `strangers`, requests that no adapter is about, with all eight; `without`, every task's
requests with the adapters of the seven others; `areas` and `kinds`, two adapters of neighbours. A line of routers.jsonl is
one task in one part under one router.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from make import ENCODERS, JOINT, SMALL, WITHOUT, Study, library, study_of, train
from router_measures import BASE, Floats, Ground, Outcome, by_request, by_token, timed
from router_rows import PAIRS, STRANGERS, TASKS
from router_tables import page

from dynlora_cli.adapters.attach import attached
from dynlora_cli.library.library import Library
from dynlora_cli.retrieval.encoders import MINILM, Encoder, base_encoder, model_encoder
from dynlora_cli.routing.router import Context, TokenRouter, needs_of, open_router

RESULTS = Path(__file__).with_name("routers.jsonl")
ROUTERS = ("calibrated", "embedding", "likelihood", "arrow", "spectr", "lag")
MARKS = ("base", "oracle", "uniform", JOINT)  # what the others are held against
ALONE, GUARDED = "alone", "guarded"
ALL, OTHERS, OUT = "all", "strangers", "without"

Record = dict[str, Any]


class Bench:
    """Measures what has no line yet, of one seed."""

    def __init__(self, study: Study, seed: int, work: Path, results: Path) -> None:
        self.study, self.seed, self.work, self.results = study, seed, work, results
        self.lines = read_lines(results)
        pairs = [name for pair in self.pairs.values() for name in pair]
        self.ground = Ground(study, {name: train(study, name, seed, work) for name in (*TASKS, *pairs)}, work)
        self._known: dict[str, dict[str, Floats]] = {}
        self.encoders: dict[str, Encoder] = {}

    @property
    def pairs(self) -> Mapping[str, tuple[str, ...]]:
        there = self.study.folder(self.work, self.seed)
        return {
            name: pair for name, pair in PAIRS.items() if all((there / one / "took.json").is_file() for one in pair)
        }

    def has(self, part: str, router: str, setting: str) -> bool:
        key = (self.study.name, self.seed, part, router, setting)
        return any(
            tuple(line[at] for at in ("study", "seed", "part", "router", "setting")) == key for line in self.lines
        )

    def add(self, part: str, router: str, setting: str, **found: Any) -> None:
        line = {
            "study": self.study.name,
            "seed": self.seed,
            "part": part,
            "router": router,
            "setting": setting,
            **found,
        }
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def known(self, task: str, names: Sequence[str]) -> dict[str, Floats]:
        """Losses of the rows of a task with the base and with single adapters; kept on the disk."""
        kept = self.study.folder(self.work, self.seed) / "losses" / f"{task}.json"
        found = self._known.setdefault(task, _read_losses(kept))
        missing = [name for name in (BASE, *names) if name not in found]
        for name in missing:
            if name == BASE:
                found[name] = self.ground.losses(task)
            else:
                with attached(self.ground.base.model, self.ground.adapters[name]):
                    found[name] = self.ground.losses(task)
        if missing:
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps({name: loss.tolist() for name, loss in found.items()}), encoding="utf-8")
        return found

    # -- parts ---------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
        """Part, name of its library, adapters, and the tasks whose rows are asked."""
        yield ALL, "all", TASKS, TASKS
        yield OTHERS, "all", TASKS, STRANGERS
        for name, pair in self.pairs.items():
            yield name, name, pair, pair
        if self.seed == self.study.seeds[0]:
            for left in TASKS:
                yield OUT, WITHOUT + left, tuple(task for task in TASKS if task != left), (left,)

    def marks(self) -> None:
        """Base, own adapter, uniform mix, and one adapter for all."""
        for part, _, names, asked in self.parts():
            if part == OUT or all(self.has(part, mark, "") for mark in MARKS):
                continue
            with self.ground.bank(names) as bank:
                mix = {name: 1 / len(names) for name in names}
                uniform = {task: self.ground.with_mixes(bank, task, [mix] * self.count(task)) for task in asked}
            for task in asked:
                known = self.known(task, names)
                self.loss(part, "base", task, known[BASE])
                self.loss(part, "oracle", task, known[task if task in names else BASE])
                self.loss(part, "uniform", task, uniform[task])
        self.joint()

    def joint(self) -> None:
        """The adapter for all tasks, where it is trained."""
        from dynlora_cli.adapters.read import read_adapter

        folder = self.study.folder(self.work, self.seed) / JOINT
        if not (folder / "took.json").is_file() or self.has(ALL, JOINT, ""):
            return
        with attached(self.ground.base.model, read_adapter(folder)):
            for part, _, _, asked in self.parts():
                for task in asked if part in (ALL, OTHERS) else ():
                    self.loss(part, JOINT, task, self.ground.losses(task))

    def count(self, task: str) -> int:
        return len(self.ground.rows(task).examples)

    def loss(self, part: str, router: str, task: str, loss_R: Floats, **more: Any) -> None:
        targets = int(self.ground.targets(task).sum())
        setting = more.pop("setting", "")
        loss = round(float(loss_R.sum()) / targets, 5)
        self.add(part, router, setting, task=task, rows=len(loss_R), targets=targets, loss=loss, **more)

    def router(self, name: str, encoder: str, setting: str) -> None:
        """One router in all parts."""
        called = name if encoder == MINILM else f"{name} ({encoder})"
        done: set[str] = {part for part, *_ in self.parts() if self.has(part, called, setting)}
        for part, kind, names, asked in self.parts():
            if part in done or (encoder != MINILM and part == OUT):
                continue
            root = library(self.study, names, encoder, self.seed, self.work, kind)
            with self.ground.bank(names) as bank:
                router = self.opened(name, bank, root, encoder, setting)
                for task in asked:
                    self.measured(part, called, setting, task, router, bank, names)
        self.time(name, called, encoder, setting)

    def opened(self, name: str, bank: Any, root: Path, encoder: str, setting: str) -> Any:
        """A router of a library, with its calibration or without."""
        kept = Library.open(root)
        if setting == ALONE and name != "calibrated":
            kept = Library(root, kept.form.model_copy(update={"calibration": None}))
        adapters = {each: self.ground.adapters[each] for each in bank.names}
        needs = needs_of(name, kept)
        context = Context(
            library=kept,
            adapters=adapters,
            bank=bank,
            base=self.ground.base,
            encoder=self.encoder(encoder) if "keys" in needs else None,
        )
        return open_router(name, context)

    def encoder(self, name: str) -> Encoder:
        if name not in self.encoders:
            model, tokenizer = self.ground.base.model, self.ground.tokenizer
            made = model_encoder(name) if name == MINILM else base_encoder(model, tokenizer, self.study.name)
            self.encoders[name] = made
        return self.encoders[name]

    def measured(
        self, part: str, called: str, setting: str, task: str, router: Any, bank: Any, names: Sequence[str]
    ) -> None:
        """One task under one router."""
        known = self.known(task, names)
        if isinstance(router, TokenRouter):
            found = by_token(bank, self.ground, task, router, known[BASE])
        else:
            found = by_request(bank, self.ground, task, router.decide(self.ground.rows(task).asked), known)
        self.loss(part, called, task, found.loss_R, setting=setting, **shares(found, task, names))

    # -- time ----------------------------------------------------------------------------------------------------------

    def time(self, name: str, called: str, encoder: str, setting: str) -> None:
        """What a request costs beside a pass of the base over its prompt; by token, what the pass takes longer."""
        if self.has("time", called, setting):
            return
        root = library(self.study, TASKS, encoder, self.seed, self.work, "all")
        ground = self.ground
        for task in TASKS:
            ground.rows(task)
        base = [timed(lambda one=one: ground.forward(one.ids)) for one in ground.timed_requests]
        with ground.bank(TASKS) as bank:
            router = self.opened(name, bank, root, encoder, setting)
            more = [self.overhead(bank, router, one) for one in ground.timed_requests]
        ratio = median(extra / own for extra, own in zip(more, base, strict=True))
        self.add("time", called, setting, milliseconds=round(1e3 * median(more), 3), base=round(1e3 * median(base), 3),
                 ratio=round(ratio, 3))  # fmt: skip

    def overhead(self, bank: Any, router: Any, one: Any) -> float:
        """Seconds."""
        deciding = timed(lambda: router.decide([one]))
        if not isinstance(router, TokenRouter):
            return deciding
        with bank.routed(router):
            routed = timed(lambda: self.ground.forward(one.ids))
        with bank.active([{bank.names[0]: 1.0}]):
            return deciding + routed - timed(lambda: self.ground.forward(one.ids))


def shares(found: Outcome, task: str, names: Sequence[str]) -> Record:
    """Shares of rows: whose own adapter was first, which the base answered; and who was first."""
    first = [names[at] if at >= 0 else BASE for at in found.first_R.tolist()]
    counted = {name: round(first.count(name) / len(first), 4) for name in sorted(set(first))}
    return {"right": counted.get(task, 0.0), "to_base": counted.get(BASE, 0.0), "first": counted}


def _read_losses(path: Path) -> dict[str, Floats]:
    import numpy as np

    return {name: np.array(loss) for name, loss in json.loads(path.read_text()).items()} if path.is_file() else {}


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def jobs(study: Study, routers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Router, encoder, setting."""
    for name in routers:
        keys = "keys" in needs_of(name)
        for encoder in ENCODERS if keys and study is SMALL else (MINILM,):
            if name != "calibrated":
                yield name, encoder, ALONE
            if encoder == MINILM:
                yield name, encoder, GUARDED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where make.py keeps runs and libraries")
    parser.add_argument("--model", type=Path, help="folder of another model than stories3M")
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument("--routers", default=",".join(ROUTERS), help="with commas between them; empty: only the marks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    if not options.table:
        if options.work is None:
            parser.error("--work FOLDER says where runs and libraries are kept")
        study = study_of(options.model)
        for seed in [int(seed) for seed in options.seeds.split(",")] if options.seeds else study.seeds:
            bench = Bench(study, seed, options.work.resolve(), options.results)
            bench.marks()
            for job in jobs(study, [name for name in options.routers.split(",") if name]):
                started = time.monotonic()
                bench.router(*job)
                print(f"{study.name}, seed {seed}: {', '.join(job)}: {time.monotonic() - started:.0f} s", flush=True)
    if not options.results.is_file():
        return 0
    options.results.with_suffix(".md").write_text(page(read_lines(options.results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
