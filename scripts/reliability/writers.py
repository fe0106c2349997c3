"""Two commands that write to one folder at a time: one waits for nobody and is refused, the other is not disturbed."""

from __future__ import annotations

import time

from . import kills
from . import made as runs
from .child import end_of, start
from .trial import Kind, Lost, ProvesNothing, Trial

APART = 0.8  # seconds between the two, at most
PAIRS = (
    ("train --overwrite", "train --overwrite"),
    ("train --overwrite", "prune --overwrite"),
    ("prune --overwrite", "train --overwrite"),
    ("merge --overwrite", "export --overwrite"),
    ("prune --overwrite", "prune --overwrite"),
)


def run(trial: Trial) -> str:
    """Start both, the second a moment later, and look what is there in the end."""
    names, out = PAIRS[trial.number % len(PAIRS)], trial.work / "out"
    for name in names:
        kills.ready(trial.made, name)
    runs.copy(trial.made / "old", out)
    apart = trial.chance.uniform(0, APART)
    logs = [trial.work / f".said-{number}" for number in range(len(names))]
    children = []
    for name, log in zip(names, logs, strict=True):
        children.append(start(kills.CASES[name].arguments(trial.made, out), log))
        time.sleep(0 if len(children) == len(names) else apart)
    answers = [end_of(child, log) for child, log in zip(children, logs, strict=True)]
    what = f"{names[0]}, and {apart:.2f} s later {names[1]}"
    for answer in answers:
        answer.must(0, 2)
        if answer.code == 2 and "in use by" not in answer.said:
            raise Lost(f"{what}: refused for another reason: {answer.said[-800:]}")
    done = [name for name, answer in zip(names, answers, strict=True) if answer.code == 0]
    if not done:
        raise Lost(f"{what}: both were refused: {answers[0].said[-400:]} {answers[1].said[-400:]}")
    faults = [_fault(trial, name) for name in done]
    if None not in faults:
        raise Lost(f"{what}: {'; '.join(map(str, faults))}")
    runs.alone(trial.work, "out")
    if len(done) == len(names):
        raise ProvesNothing("one had ended before the other began to write")
    return f"one was refused, {'the first' if answers[0].code == 0 else 'the second'} made its folder whole"


def _fault(trial: Trial, name: str) -> Lost | None:
    """What is wrong with the folder as the work of this command."""
    case, out = kills.CASES[name], trial.work / "out"
    try:
        if case.new == "new":
            runs.same_run(out, trial.made / "new")
        else:
            kills.is_new(out, trial.made / case.new)
    except Lost as lost:
        return lost
    return None


KIND = Kind(
    name="writers",
    what="two commands write to one folder at a time: one is refused by name, the other's folder is whole",
    tried=40,
    bounded=1,
    batch=5,
    seconds=400,
    prepare=runs.prepare,
    run=run,
)
