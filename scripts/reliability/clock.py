"""A clock that jumps back and forth by years while dynlora runs, and files whose dates are of any year."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from random import Random

from . import kills
from . import made as runs
from .child import Fault, command, kill_at_path
from .trial import Kind, Lost, Trial

YEARS = 60 * 60 * 24 * 365 * 20
OFTEN = 1 / 3  # of the calls that ask for the time
LONG = 600.0  # seconds; none of these runs takes as long
LAST = "step-6"


def jumping(seed: float, then: Fault | None = None) -> Fault:
    """A fault: every third answer of the clock, on average, is up to 20 years off in another way than the one before.

    What it is about: Python's `time.time`, `localtime`, `gmtime`, `strftime`. Nothing in C sees it, nor does
    `time.monotonic`, as when a person or a time server sets the clock.

    Args:
        seed: decides about the jumps.
        then: a further fault.
    """

    def install() -> None:
        chance, true, off = Random(seed), time.time, 0.0
        originals = {name: getattr(time, name) for name in ("localtime", "gmtime", "strftime")}

        def now() -> float:
            nonlocal off
            if chance.random() < OFTEN:
                off = chance.uniform(-YEARS, YEARS)
            return true() + off

        def at(name: str, seconds: float | None = None) -> time.struct_time:
            return originals[name](now() if seconds is None else seconds)

        def written(form: str, moment: time.struct_time | None = None) -> str:
            return originals["strftime"](form, at("localtime") if moment is None else moment)

        time.time, time.strftime = now, written
        time.time_ns = lambda: int(now() * 1e9)
        time.localtime = lambda seconds=None: at("localtime", seconds)
        time.gmtime = lambda seconds=None: at("gmtime", seconds)
        if then:
            then()

    return install


def jumble(folder: Path, chance: Random) -> None:
    """Give every file and folder a date of its own, from 20 years ago to 20 years ahead."""
    for path in sorted(folder.rglob("*")):
        moment = time.time() + chance.uniform(-YEARS, YEARS)
        os.utime(path, (moment, moment))


def run(trial: Trial) -> str:
    """A run to its end, a run that is killed and goes on, or the pruning of one."""
    out = trial.work / "out"
    if trial.number % 3 == 0:
        said = command(runs.train(trial.made, out), trial.work, jumping(trial.chance.random())).must(0).said
        _right(out, said, trial)
        return "a run ended at the same bytes, with durations and dates in order"
    if trial.number % 3 == 1:
        killed = command(runs.train(trial.made, out), trial.work, jumping(trial.chance.random(), kill_at_path(LAST)))
        if not killed.killed:
            raise Lost(f"it was not stopped: {killed.said[-500:]}")
        jumble(out, trial.chance)
        again = runs.train(trial.made, out, "--resume")
        _right(out, command(again, trial.work, jumping(trial.chance.random())).must(0).said, trial)
        return "a run went on from its newest checkpoint to the same bytes"
    case = kills.CASES["prune --overwrite"]
    kills.ready(trial.made, "prune --overwrite")
    runs.copy(trial.made / str(case.old), out)
    jumble(out, trial.chance)
    said = command(case.arguments(trial.made, out), trial.work, jumping(trial.chance.random())).must(0).said
    kills.is_new(out, trial.made / case.new)
    _sane(out, said)
    return "a pruned adapter took the old one's place"


def _right(out: Path, said: str, trial: Trial) -> None:
    runs.same_run(out, trial.made / "new")
    _sane(out, said)


def _sane(out: Path, said: str) -> None:
    """Durations are of this afternoon, steps are in order, and dates can be read."""
    events = [json.loads(line) for line in _lines(out / "metrics.jsonl")]
    steps = [event["step"] for event in events if event["event"] == "train"]
    if steps != sorted(steps):
        raise Lost(f"steps are out of order: {steps}")
    record = json.loads((out / "dynlora.json").read_text(encoding="utf-8"))
    for where, seconds in [*_seconds(record, "dynlora.json"), *_seconds(events, "metrics.jsonl")]:
        if not math.isfinite(seconds) or not 0 <= seconds < LONG:
            raise Lost(f"{where} is {seconds} s")
    for name in ("started", "finished"):
        if record.get(name):
            time.strptime(record[name], "%Y-%m-%dT%H:%M:%S%z")
    for text in (said, *(path.read_text(encoding="utf-8") for path in out.glob("README.md"))):
        if odd := re.search(r"(?<![\w.])-\d[\d.,]* (s|min|h|d)\b", text):
            raise Lost(f"a duration below nothing: {odd[0]}")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _seconds(value: object, where: str) -> list[tuple[str, float]]:
    """Every number that is called seconds."""
    if isinstance(value, list):
        return [found for item in value for found in _seconds(item, where)]
    if not isinstance(value, dict):
        return []
    own = [(f"{where}: {k}", v) for k, v in value.items() if k.endswith("seconds") and isinstance(v, (int, float))]
    return own + [found for key, item in value.items() for found in _seconds(item, f"{where}: {key}")]


KIND = Kind(
    name="clock",
    what="the clock jumps by up to 20 years, back and forth, and files have dates of any year: bytes, durations and the"
    " order of checkpoints stay right (the clock as Python's `time` tells it)",
    tried=36,
    bounded=0,
    batch=6,
    seconds=400,
    prepare=runs.prepare,
    run=run,
)
