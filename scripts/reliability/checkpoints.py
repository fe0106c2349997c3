"""Damaged bytes of a run that is to go on: each is found and named, or it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

from . import made as runs
from .child import command, kill_at_path
from .trial import Kind, Lost, Trial

STOPPED = "stopped"
STEP = 4  # the newest checkpoint of the run that was stopped
BESIDE = ("dynlora.json", "metrics.jsonl", "rank_events.jsonl", "checkpoints/last")
EVERY = 20  # of so many trials whose damage was found one also goes on to the end, which takes seconds


def prepare(made: Path) -> None:
    """A run that was killed when it was about to save its last checkpoint, and the one before it."""
    runs.prepare(made)
    if not (made / STOPPED).exists():
        answer = command(runs.train(made, made / STOPPED), made, kill_at_path(f"step-{STEP + 2}"))
        newest = {path.name for path in (made / STOPPED / "checkpoints").glob("step-*")}
        if not answer.killed or f"step-{STEP}" not in newest or len(newest) < 2:
            raise Lost(
                f"the run to be damaged was not stopped after step {STEP}: {sorted(newest)}; {answer.said[-500:]}"
            )
        runs.settled(made / STOPPED)


def regions(checkpoint: Path) -> list[tuple[str, int, int]]:
    """The parts of all files: of JSON files each line, of tensor files the header's length, the header, each tensor."""
    found = []
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            found += [(path.name, 0, 8), (path.name, 8, end)]
            header = json.loads(content[8:end])
            spans = [value["data_offsets"] for key, value in header.items() if key != "__metadata__"]
            found += [(path.name, end + start, end + stop) for start, stop in spans if stop > start]
        else:
            at = 0
            for line in content.splitlines(keepends=True):
                found.append((path.name, at, at + len(line)))
                at += len(line)
    return found


def run(trial: Trial) -> str:
    """Nine of ten trials damage the newest checkpoint, one what lies beside it."""
    out = runs.copy(trial.made / STOPPED, trial.work / "out")
    if trial.number % 10 == 9:
        name = BESIDE[trial.number // 10 % len(BESIDE)]
        at = _damage(out / name, 0, (out / name).stat().st_size, trial)
        return _goes_on(trial, out, f"byte {at} of {name}", log=name if name.endswith(".jsonl") else None)
    checkpoint = out / "checkpoints" / f"step-{STEP}"
    every = regions(checkpoint)
    name, start, stop = every[trial.number % len(every)]
    at = _damage(checkpoint / name, start, stop, trial)
    return _found(trial, out, checkpoint, name, at)


def _damage(path: Path, start: int, stop: int, trial: Trial) -> int:
    """Give a byte another value; returns where."""
    content, at = bytearray(path.read_bytes()), trial.chance.randrange(start, stop)
    content[at] = (content[at] + trial.chance.randrange(1, 256)) % 256
    path.write_bytes(content)
    return at


def _found(trial: Trial, out: Path, checkpoint: Path, name: str, at: int) -> str:
    from dynlora_cli.runs import folder as run_folder
    from dynlora_cli.training.checkpoint import fault_in

    fault = fault_in(checkpoint, run_folder.read_record(out))
    where = f"byte {at} of {name}"
    if fault is None and name != run_folder.STATE:
        raise Lost(f"{where} was changed, and nobody noticed")
    if fault is None or trial.number % EVERY == 0:
        return _goes_on(trial, out, where, fault)
    return "found and named"


def _goes_on(trial: Trial, out: Path, where: str, fault: str | None = None, log: str | None = None) -> str:
    """`--resume` ends at the same bytes, from an older checkpoint if need be, or refuses by name and touches nothing."""
    before = runs.contents(out)
    answer = command(runs.train(trial.made, out, "--resume"), trial.work)
    try:
        answer.must(0, 2)
        if answer.code == 2:
            if runs.contents(out) != before:
                raise Lost("it was refused, and files were changed")
            if not any(name in answer.said for name in (*BESIDE, "checkpoints", "step-")):
                raise Lost(f"it was refused without a file's name: {answer.said[-800:]}")
            return "refused by name, nothing touched"
        if fault and f"step-{STEP}" not in answer.said:
            raise Lost(f"the damaged checkpoint was not named: {answer.said[-800:]}")
        runs.same_run(out, trial.made / "new", log)
    except Lost as lost:
        raise Lost(f"{where} was changed: {lost}") from None
    if log:
        return "went on to the same bytes; the log keeps the changed byte"
    return "named, an older one taken, same bytes at the end" if fault else "went on to the same bytes"


KIND = Kind(
    name="checkpoints",
    what="a byte of any part of a checkpoint, or of the record and the logs beside it, has another value: `--resume`"
    " names it and goes on from an older one to the same bytes, or refuses",
    tried=500,
    bounded=4,
    batch=20,
    seconds=400,
    prepare=prepare,
    run=run,
)
