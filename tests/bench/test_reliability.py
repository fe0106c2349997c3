"""scripts/reliability: its bounded form loses nothing, it counts what is lost, and its page is fresh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from reliability import attempts, page  # noqa: E402 - they are scripts, not a package
from reliability.kinds import KINDS  # noqa: E402
from reliability.trial import Impossible, Kind, Lost, ProvesNothing, Trial  # noqa: E402

BENCH = SCRIPTS / "bench"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forks")


def refuse() -> str:
    raise ProvesNothing("too late")


def lack() -> str:
    raise Impossible("no tmpfs")


def lose() -> str:
    raise Lost("the old run")


def die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "not here"


def hang() -> str:
    time.sleep(60)
    return "not here"


def stumble() -> str:
    raise KeyError("a")


CASES: list[tuple[Callable[[], str], str, str]] = [
    (lambda: "whole", attempts.SURVIVED, "whole"),
    (refuse, attempts.NOTHING, "too late"),
    (lack, attempts.IMPOSSIBLE, "no tmpfs"),
    (lose, attempts.LOST, "the old run"),
    (die, attempts.LOST, "the process died (exit code -9)"),
    (hang, attempts.LOST, "it hangs: no end after 1 s (exit code -9)"),
    (stumble, attempts.LOST, "KeyError: 'a'"),
    (lambda: "whole again", attempts.SURVIVED, "whole again"),
]


def toy(run: Callable[[Trial], str]) -> Kind:
    return Kind("kills", "toys", 8, 2, 8, 1.0, lambda made: None, run)


def test_every_outcome_is_counted_as_what_it_is(tmp_path: Path):
    kind = toy(lambda trial: CASES[trial.number][0]())
    (tmp_path / "made").mkdir()
    outcomes = list(attempts.attempts(kind, 1, range(len(CASES)), tmp_path / "made"))
    assert outcomes == [(number, which, text) for number, (_, which, text) in enumerate(CASES)]
    line = attempts.line_of(kind, 1, outcomes, 60.0)
    assert line["survived"] == {"whole": 1, "whole again": 1}
    assert [lost["trial"] for lost in line["lost"]] == [3, 4, 5, 6]
    text = page.text([line])
    assert "| kills | 1 | 8 | 2 | 1 | 1 | 4 | 1.0 |" in text
    assert "`python scripts/reliability --seed 1 --once kills:3`" in text


def test_a_trial_depends_on_its_seed_and_number_alone(tmp_path: Path):
    kind = toy(lambda trial: str(trial.chance.random()))
    (tmp_path / "made").mkdir()
    many = list(attempts.attempts(kind, 1, range(4), tmp_path / "made"))
    assert list(attempts.attempts(kind, 1, [2], tmp_path / "made")) == [many[2]]
    assert next(attempts.attempts(kind, 2, [2], tmp_path / "made")) != many[2]


def test_the_record_outlives_a_torn_line_and_a_batch_made_again_counts_once(tmp_path: Path):
    record = tmp_path / "trials.jsonl"
    lost = attempts.line_of(toy(lambda trial: ""), 1, [attempts.Outcome(0, attempts.LOST, "the old run")], 1.0)
    attempts.append(record, lost)
    with record.open("a") as file:
        file.write('{"seed": 1, "ki')
    assert attempts.read(record) == [lost]
    good = attempts.line_of(toy(lambda trial: ""), 1, [attempts.Outcome(0, attempts.SURVIVED, "whole")], 1.0)
    attempts.append(record, good)
    assert attempts.read(record) == [lost, good]
    assert attempts.newest(attempts.read(record)) == [good]
    text = page.text([lost, good])
    assert "Nothing was lost" in text
    assert "Found and mended" in text


def test_the_page_is_fresh():
    lines = attempts.read(BENCH / "reliability" / "trials.jsonl")
    assert lines
    assert (BENCH / "RELIABILITY.md").read_text(encoding="utf-8") == page.text(lines), (
        "python scripts/reliability --page"
    )


@pytest.mark.slow
def test_the_bounded_form_loses_nothing():
    command = [sys.executable, SCRIPTS / "reliability", "--seed", "1", "--bounded"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost\n")
    assert all(f"{name} {kind.bounded}/{kind.bounded}:" in done.stdout for name, kind in KINDS.items() if kind.bounded)
