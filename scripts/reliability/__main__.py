"""What happens to dynlora when it is killed, given damaged input, a full disk, a wrong clock, or a second writer?

    python scripts/reliability --seed 1                      # all kinds; hours
    python scripts/reliability --seed 1 --kinds kills,rows   # some
    python scripts/reliability --seed 1 --count 0.1          # a tenth of the trials
    python scripts/reliability --seed 1 --bounded            # few of each, as CI does; records nothing
    python scripts/reliability --seed 1 --once kills:37      # one trial again, such as one that was lost
    python scripts/reliability --page                        # only write RELIABILITY.md again

A batch of trials is a line of scripts/bench/reliability/trials.jsonl; what is there is not tried again, unless something
was lost. scripts/bench/RELIABILITY.md is made of it. The exit code is 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [str(HERE.parent), str(TESTS), str(TESTS / "cli")]

from reliability import attempts, page  # noqa: E402 - they are scripts, not a package
from reliability.kinds import KINDS  # noqa: E402
from reliability.trial import Kind  # noqa: E402

RECORD = HERE.parent / "bench" / "reliability" / "trials.jsonl"
PAGE = HERE.parent / "bench" / "RELIABILITY.md"


def main() -> int:
    """Returns the exit code."""
    asked = _asked()
    if asked.page:
        page.write(RECORD, PAGE)
        return 0
    settle_surroundings()
    with tempfile.TemporaryDirectory(prefix="dynlora-reliability-", ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        os.environ["DYNLORA_CACHE"] = str(Path(scratch) / "cache")
        if asked.once:
            return _once(asked.once, asked.seed, made)
        lost = sum(_try(KINDS[name], asked, made) for name in asked.kinds)
    if not asked.bounded:
        page.write(RECORD, PAGE)
    print(f"{lost} lost" if lost else "nothing lost")
    return bool(lost)


def settle_surroundings() -> None:
    """What trials are made under: no network, one thread, no warnings of other packages among our messages."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python scripts/reliability", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, help="decides about everything that is tried")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {','.join(KINDS)}")
    parser.add_argument(
        "--count", type=float, default=1.0, metavar="F", help="so many times the usual number of trials"
    )
    parser.add_argument("--bounded", action="store_true", help="few trials of each kind; nothing is recorded")
    parser.add_argument("--once", metavar="KIND:NUMBER", help="make one trial again, and record nothing")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    asked = parser.parse_args()
    asked.kinds = asked.kinds.split(",")
    if unknown := set(asked.kinds) - KINDS.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if asked.seed is None and not asked.page:
        parser.error("say --seed N")
    if not asked.count > 0:
        parser.error("--count must be above 0")
    return asked


def _once(which: str, seed: int, made: Path) -> int:
    name, _, number = which.partition(":")
    if name not in KINDS or not number.isdigit():
        raise SystemExit(f"--once {which}: say KIND:NUMBER, with a kind of {', '.join(KINDS)}")
    if fault := _unready(KINDS[name], made):
        print(f"lost: what its trials read could not be made: {fault}")
        return 1
    outcome = next(attempts.attempts(KINDS[name], seed, [int(number)], made))
    print(f"{outcome.which}: {outcome.text}")
    return outcome.which == attempts.LOST


def _unready(kind: Kind, made: Path) -> str | None:
    """Make what trials read; returns what went wrong, which is lost as a trial is."""
    try:
        kind.prepare(made)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _try(kind: Kind, asked: argparse.Namespace, made: Path) -> int:
    """Make what is to be tried of a kind; returns how many were lost."""
    count = kind.bounded if asked.bounded else math.ceil(kind.tried * asked.count / kind.batch) * kind.batch
    size = max(1, count) if asked.bounded else kind.batch
    lines = [] if asked.bounded else attempts.newest(attempts.read(RECORD))
    done = {line["first"]: line for line in lines if (line["seed"], line["kind"]) == (asked.seed, kind.name)}
    todo = [first for first in range(0, count, size) if first not in done or done[first]["lost"]]
    if todo and (fault := _unready(kind, made)):
        print(f"{kind.name}: what its trials read could not be made: {fault}", flush=True)
        return 1
    lost = 0
    for first in todo:
        began = time.monotonic()
        outcomes = list(attempts.attempts(kind, asked.seed, range(first, first + size), made))
        line = attempts.line_of(kind, asked.seed, outcomes, time.monotonic() - began)
        if not asked.bounded:
            attempts.append(RECORD, line)
        lost += len(line["lost"])
        print(f"{kind.name} {first + size}/{count}: {line['seconds']:.0f} s, lost {len(line['lost'])}", flush=True)
        for each in line["lost"]:
            print(f"  {kind.name}:{each['trial']}: {each['what']}", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
