"""Which routers are worth using? Losses and choices of each router on the test rows of eight tasks.

    python scripts/bench/routers/run.py --work FOLDER                     # what is missing in routers.jsonl, then routers.md
    python scripts/bench/routers/run.py --work FOLDER --seeds 0 --routers likelihood,arrow
    python scripts/bench/routers/run.py --work FOLDER --model FOLDER      # another model
    python scripts/bench/routers/run.py --table                           # only writes routers.md again

make.py makes what is measured here. A router sees the prompt alone; one that decides by token sees each token as it comes.
Settings of a router: `alone` with its own rule on "none of them", `guarded` by the threshold of the library's calibration,
and `5 %` and `unrelated named` by those of calibrations at --false-activation 5% and with --unrelated FILE.
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
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from make import (
    ENCODERS,
    JOINT,
    LOOSE,
    NAMED,
    SMALL,
    TRAINED,
    WITHOUT,
    KeptVectors,
    Study,
    calibrated_as,
    study_of,
    train,
)
from make import library as calibrated_library
from router_measures import BASE, Floats, Ground, Outcome, Watched, by_token, timed, watched_losses
from router_rows import PAIRS, STRANGERS
from router_tables import page

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.config.mix import mix_text
from dynlora_cli.library.library import Library
from dynlora_cli.retrieval.encoders import MINILM, Encoder, base_encoder, model_encoder
from dynlora_cli.routing.router import Context, TokenRouter, needs_of, open_router

RESULTS = Path(__file__).with_name("routers.jsonl")
ROUTERS = ("calibrated", "embedding", "likelihood", "arrow", "spectr", "lag")
ALONE, GUARDED = "alone", "guarded"
LOOSENED = ("calibrated", "embedding")  # also with calibrations by other settings
ALL, OTHERS, OUT = "all", "strangers", "without"

Record = dict[str, Any]


class Bench:
    """Measures what has no line yet, of one seed."""

    def __init__(self, study: Study, seed: int, work: Path, results: Path) -> None:
        self.study, self.seed, self.work, self.results = study, seed, work, results
        self.lines = read_lines(results)
        pairs = [name for pair in self.pairs.values() for name in pair]
        self.ground = Ground(study, {name: train(study, name, seed, work) for name in (*study.tasks, *pairs)}, work)
        self.kept: dict[str, dict[str, float]] = {}
        self.encoders: dict[str, Encoder] = {}

    @property
    def pairs(self) -> Mapping[str, tuple[str, ...]]:
        there = self.study.folder(self.work, self.seed)
        return {
            name: pair for name, pair in PAIRS.items() if all((there / one / "took.json").is_file() for one in pair)
        }

    def has(self, part: str, router: str, setting: str, task: str | None = None) -> bool:
        key = (self.study.name, self.seed, part, router, setting, task)
        names = ("study", "seed", "part", "router", "setting", "task")
        return any(tuple(map(line.get, names)) == key for line in self.lines)

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

    def losses(self, task: str, bank: Any, mixes: Sequence[Mapping[str, float]]) -> Floats:
        """The loss of each row of a task under its own mix; what was measured before is kept on the disk."""
        path = self.study.folder(self.work, self.seed) / "losses" / f"{task}.json"
        if task not in self.kept:
            self.kept[task] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kept, names = self.kept[task], [f"{row}: {mix_text(mix)}" for row, mix in enumerate(mixes)]
        missing = {row: mix for row, mix in enumerate(mixes) if names[row] not in kept}
        if missing:
            loss_R = self.ground.with_mixes(bank, task, missing)
            kept |= {names[row]: float(loss_R[row]) for row in missing}
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(kept), encoding="utf-8")
        return np.array([kept[name] for name in names])

    # -- parts ---------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
        """Part, name of its library, adapters, and the tasks whose rows are asked."""
        yield ALL, "all", self.study.tasks, self.study.tasks
        yield OTHERS, "all", self.study.tasks, STRANGERS
        for name, pair in self.pairs.items():
            yield name, name, pair, pair
        if self.study is SMALL and self.seed == SMALL.seeds[0]:
            for left in self.study.tasks:
                yield OUT, WITHOUT + left, tuple(task for task in self.study.tasks if task != left), (left,)

    def marks(self) -> None:
        """Base, own adapter, uniform mix, and one adapter for all."""
        for part, _, names, asked in self.parts():
            missing = [task for task in asked if part != OUT and not self.has(part, "uniform", "", task)]
            for task in missing:
                uniform = {name: 1 / len(names) for name in names}
                marks = {"base": {}, "oracle": {task: 1.0} if task in names else {}, "uniform": uniform}
                with self.ground.bank(names) as bank:
                    for mark, mix in marks.items():
                        self.loss(part, mark, task, self.losses(task, bank, [mix] * self.count(task)))
        self.joint()

    def joint(self) -> None:
        """The adapter for all tasks, where it is trained."""
        folder = self.study.folder(self.work, self.seed) / JOINT
        asked = [(ALL, task) for task in self.study.tasks] + [(OTHERS, task) for task in STRANGERS]
        missing = [(part, task) for part, task in asked if not self.has(part, JOINT, "", task)]
        if not missing or not (folder / "took.json").is_file():
            return
        with attached(self.ground.base.model, read_adapter(folder)):
            for part, task in missing:
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
        for part, kind, names, asked in self.parts():
            missing = [task for task in asked if not self.has(part, called, setting, task)]
            if not missing or (encoder != MINILM and part == OUT):
                continue
            root = calibrated_library(self.study, names, encoder, self.seed, self.work, kind)
            with self.ground.bank(names) as bank:
                router = self.opened(name, bank, root, encoder, setting)
                for task in missing:
                    self.measured(part, called, setting, task, router, bank, names)
        self.time(name, called, encoder, setting)

    def opened(self, name: str, bank: Any, root: Path, encoder: str, setting: str, *, kept: bool = True) -> Any:
        """A router of a library, with its calibration or without; vectors of texts are kept, unless time is measured."""
        if setting in (LOOSE, NAMED):
            root = calibrated_as(self.study, root, self.seed, self.work, setting)
        library = Library.open(root)
        if setting == ALONE and name != "calibrated":
            library = Library(root, library.form.model_copy(update={"calibration": None}))
        adapters = {each: self.ground.adapters[each] for each in bank.names}
        needs = needs_of(name, library)
        context = Context(
            library=library,
            adapters=adapters,
            bank=bank,
            base=self.ground.base,
            encoder=self.encoder(encoder, kept=kept) if "keys" in needs else None,
        )
        return open_router(name, context)

    def encoder(self, name: str, *, kept: bool) -> Encoder:
        if name not in self.encoders:
            model, tokenizer = self.ground.base.model, self.ground.tokenizer
            made = model_encoder(name) if name == MINILM else base_encoder(model, tokenizer, self.study.name)
            self.encoders[name] = made
        found = self.encoders[name]
        return KeptVectors(found, self.work / f"{self.study.name}-vectors") if kept else found

    def measured(
        self, part: str, called: str, setting: str, task: str, router: Any, bank: Any, names: Sequence[str]
    ) -> None:
        """One task under one router."""
        if isinstance(router, TokenRouter):
            found = by_token(bank, self.ground, task, router, self.losses(task, bank, [{}] * self.count(task)))
        else:
            mixes = [dict(one.mix) for one in router.decide(self.ground.rows(task).asked)]
            first = [bank.names.index(max(mix, key=lambda name: mix[name])) if mix else -1 for mix in mixes]
            found = Outcome(self.losses(task, bank, mixes), np.array(first))
        self.loss(part, called, task, found.loss_R, setting=setting, **shares(found, task, names))

    # -- routers that are trained --------------------------------------------------------------------------------------

    def trained(self, name: str) -> None:
        """A router over all adapters, in the parts that have them; `off` leaves one of them out."""
        folder = self.study.folder(self.work, self.seed) / f"router {name}"
        if not (folder / "took.json").is_file():
            return
        adapter = read_adapter(folder, routed=True)
        assert isinstance(adapter, RoutedAdapter)
        columns = list(adapter.members)
        for part, _, names, asked in self.parts():
            missing = [task for task in asked if set(names) <= set(columns) and not self.has(part, name, "", task)]
            off = tuple(column for column in columns if column not in names)
            if not missing or (part not in (ALL, OTHERS, OUT)):
                continue
            with replace(adapter, off=off).put_on(self.ground.base.model) as gates:
                watched = Watched(gates.gates, len(columns))
                gates.gates = watched.gates
                for task in missing:
                    found = watched_losses(self.ground, task, watched)
                    self.loss(part, name, task, found.loss_R, setting="", **shares(found, task, columns))
        self.time_trained(name, adapter)

    def time_trained(self, name: str, adapter: RoutedAdapter) -> None:
        """What a pass over a prompt takes longer than with a single adapter."""
        if self.has("time", name, ""):
            return
        base = [timed(lambda one=one: self.ground.forward(one.ids)) for one in self.ground.timed_requests]
        with self.ground.bank(self.study.tasks) as bank, bank.active([{self.study.tasks[0]: 1.0}]):
            single = [timed(lambda one=one: self.ground.forward(one.ids)) for one in self.ground.timed_requests]
        with adapter.put_on(self.ground.base.model):
            routed = [timed(lambda one=one: self.ground.forward(one.ids)) for one in self.ground.timed_requests]
        more = [one - other for one, other in zip(routed, single, strict=True)]
        self.told_time(name, "", more, base)

    # -- time ----------------------------------------------------------------------------------------------------------

    def time(self, name: str, called: str, encoder: str, setting: str) -> None:
        """What a request costs beside a pass of the base over its prompt; by token, what the pass takes longer."""
        if self.has("time", called, setting):
            return
        root = calibrated_library(self.study, self.study.tasks, encoder, self.seed, self.work, "all")
        ground = self.ground
        for task in self.study.tasks:
            ground.rows(task)
        base = [timed(lambda one=one: ground.forward(one.ids)) for one in ground.timed_requests]
        with ground.bank(self.study.tasks) as bank:
            router = self.opened(name, bank, root, encoder, setting, kept=False)
            more = [self.overhead(bank, router, one) for one in ground.timed_requests]
        self.told_time(called, setting, more, base)

    def told_time(self, called: str, setting: str, more: Sequence[float], base: Sequence[float]) -> None:
        ratio = median(extra / own for extra, own in zip(more, base, strict=True))
        ms = {"milliseconds": round(1e3 * median(more), 3), "base": round(1e3 * median(base), 3)}
        self.add("time", called, setting, **ms, ratio=round(ratio, 3))

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


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def jobs(study: Study, routers: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Router, encoder, setting."""
    for name in routers:
        keys = "keys" in needs_of(name)
        for encoder in ENCODERS if keys and study is SMALL else (MINILM,):
            if name != "calibrated":
                yield name, encoder, ALONE
            if encoder == MINILM and study is SMALL:
                yield name, encoder, GUARDED
        if name in LOOSENED and study is SMALL:
            yield name, MINILM, LOOSE
            yield name, MINILM, NAMED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where make.py keeps runs and libraries")
    parser.add_argument("--model", type=Path, help="folder of another model than stories3M")
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument(
        "--routers", default=",".join((*ROUTERS, *TRAINED)), help="with commas between them; empty: only the marks"
    )
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
            wanted = [name for name in options.routers.split(",") if name]
            for name in wanted:
                if name in TRAINED:
                    bench.trained(name)
            for job in jobs(study, [name for name in wanted if name not in TRAINED]):
                started = time.monotonic()
                bench.router(*job)
                print(f"{study.name}, seed {seed}: {', '.join(job)}: {time.monotonic() - started:.0f} s", flush=True)
    if not options.results.is_file():
        return 0
    options.results.with_suffix(".md").write_text(page(read_lines(options.results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
