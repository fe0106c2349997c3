"""One of two processes of a run is killed: the run ends with a message, and goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from . import made as runs
from .trial import Kind, Lost, ProvesNothing, Trial

STEPS, SAVED = 24, 4
SETTINGS = (
    f"train.max_steps={STEPS}", f"train.save_steps={SAVED}", f"eval.steps={STEPS}", "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=4",
)  # fmt: skip
REFERENCE = "two processes"
PATIENCE = 240.0  # seconds for a run to end by itself; two processes load torch on a machine that may be busy


def _start(made: Path, out: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    arguments = ["train", made / "recipe.yaml", "--output-dir", out, "--devices", "2", *sets, *more]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "dynlora_cli", *map(str, arguments)],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Lost(f"it hangs: nothing after {PATIENCE:.0f} s; {log.read_text(errors='replace')[-500:]}") from None
    return code, log.read_text(encoding="utf-8", errors="replace")


def prepare(made: Path) -> None:
    """The run that nothing befell."""
    runs.prepare(made)
    if not (made / REFERENCE).exists():
        log = made / ".said-ranks"
        code, said = _end(_start(made, made / REFERENCE, log), log)
        if code:
            raise Lost(f"exit code {code}: {said[-800:]}")


def run(trial: Trial) -> str:
    """Kill one process some time after a step, and go on with both."""
    out, log, rank = trial.work / "out", trial.work / ".said-0", trial.chance.randrange(2)
    step, later = trial.chance.randrange(1, STEPS), trial.chance.uniform(0, 0.1)
    process = _start(trial.made, out, log)
    workers = _at_step(process, out, step)
    time.sleep(later)
    if len(workers) < 2 or not workers[rank].is_running():
        _end(process, log)
        raise ProvesNothing("it was done before a process could be killed")
    workers[rank].kill()
    code, said = _end(process, log)
    try:
        if not code:
            runs.same_run(out, trial.made / REFERENCE)
            raise ProvesNothing("it was done before a process could be killed")
        if "Traceback" in said or f"process {rank} was killed" not in said:
            raise Lost(f"exit code {code}, and it does not say that process {rank} was killed: {said[-1500:]}")
        if left := [each.pid for each in workers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
            raise Lost(f"processes go on: {left}")
        return _goes_on(trial, out)
    except Lost as lost:
        raise Lost(f"process {rank} killed {later:.2f} s after step {step}: {lost}") from None


def _at_step(process: subprocess.Popen[bytes], out: Path, step: int) -> list[psutil.Process]:
    """The two processes in the order of their ranks, once this step is in the log."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        path = out / "metrics.jsonl"
        if path.is_file() and f'"step": {step},' in path.read_text(encoding="utf-8"):
            break
        time.sleep(0.005)
    try:
        found = psutil.Process(process.pid).children()
        return sorted(found, key=lambda each: int(each.environ().get("RANK", "9")))
    except psutil.NoSuchProcess:
        return []


def _goes_on(trial: Trial, out: Path) -> str:
    saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    log = trial.work / ".said-1"
    code, said = _end(_start(trial.made, out, log, "--resume" if saved else "--overwrite"), log)
    if code:
        raise Lost(f"it did not go on: exit code {code}: {said[-1500:]}")
    runs.same_run(out, trial.made / REFERENCE)
    if "summary" not in json.loads((out / "dynlora.json").read_text(encoding="utf-8")):
        raise Lost("the record has no summary")
    return "said which; went on to the same bytes" if saved else "said which; nothing was saved, it began anew"


KIND = Kind(
    name="ranks",
    what="one of the two processes of `--devices 2` is killed: the run ends by itself, says which, and goes on to the same"
    " bytes",
    tried=8,
    bounded=0,
    batch=2,
    seconds=600,
    prepare=prepare,
    run=run,
)
