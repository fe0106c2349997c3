"""Makes trials in a process of their own, so that even a crash of the interpreter is counted; and keeps the record.

A line of the record is a batch of trials of one kind and seed:

    seed, kind, first, tried       trials first .. first + tried - 1
    survived, nothing, impossible  how, and how many times; `nothing`: trials that prove nothing
    lost                           a list of {trial, what}; must be empty
    seconds, version, date         how long it took, of which dynlora, and when

A batch that lost something is made again by the next call; its older line stays as the history of what was found.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .trial import Impossible, Kind, Lost, ProvesNothing, Trial, chance_of

SURVIVED, NOTHING, IMPOSSIBLE, LOST = "survived", "nothing", "impossible", "lost"
ROOT = f"{Path(__file__).resolve().parents[2]}/"
Line = dict[str, Any]


class Outcome(NamedTuple):
    """What came of a trial: survived, nothing, impossible or lost, and a text."""

    number: int
    which: str
    text: str


def attempt(kind: Kind, seed: int, number: int, made: Path) -> Outcome:
    """Make one trial in this process."""
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=f"{kind.name.replace(' ', '-')}-{number}-") as work:
        trial = Trial(Path(work), made, number, chance_of(kind.name, seed, number), seed)
        try:
            return Outcome(number, SURVIVED, kind.run(trial))
        except ProvesNothing as nothing:
            return Outcome(number, NOTHING, str(nothing))
        except Impossible as impossible:
            return Outcome(number, IMPOSSIBLE, str(impossible))
        except Lost as lost:
            return Outcome(number, LOST, _anywhere(str(lost), work))
        except Exception as error:
            return Outcome(number, LOST, _anywhere(f"{type(error).__name__}: {error}", work))


def _anywhere(text: str, work: str) -> str:
    """A text without the places of this machine."""
    return text.replace(work, "WORK").replace(ROOT, "").replace(f"{sys.prefix}/", "").replace(f"{sys.base_prefix}/", "")


def attempts(kind: Kind, seed: int, numbers: Sequence[int], made: Path) -> Iterator[Outcome]:
    """Make trials one after the other in another process, and go on in a new one where that dies or hangs."""
    left = list(numbers)
    while left:
        for outcome in _in_a_process(kind, seed, left, made):
            left.remove(outcome.number)
            yield outcome


def _in_a_process(kind: Kind, seed: int, numbers: Sequence[int], made: Path) -> Iterator[Outcome]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            for number in numbers:
                os.write(writing, json.dumps(attempt(kind, seed, number, made)).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    done = 0
    with open(reading, "rb", buffering=0) as pipe:
        while done < len(numbers):
            ready, _, _ = select.select([pipe], [], [], kind.seconds)
            line = pipe.readline() if ready else b""
            if not line:
                why = "the process died" if ready else f"it hangs: no end after {kind.seconds:.0f} s"
                os.kill(child, signal.SIGKILL)
                break
            done += 1
            yield Outcome(*json.loads(line))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if done < len(numbers):
        yield Outcome(numbers[done], LOST, f"{why} (exit code {status})")


# -- the record ------------------------------------------------------------------------------------------------------


def line_of(kind: Kind, seed: int, outcomes: Sequence[Outcome], seconds: float) -> Line:
    """The line of a batch."""
    from dynlora_cli import __version__

    counted = {
        which: Counter(o.text for o in outcomes if o.which == which) for which in (SURVIVED, NOTHING, IMPOSSIBLE)
    }
    return {
        "seed": seed,
        "kind": kind.name,
        "first": outcomes[0].number,
        "tried": len(outcomes),
        **{which: dict(sorted(texts.items())) for which, texts in counted.items()},
        "lost": [{"trial": o.number, "what": o.text} for o in outcomes if o.which == LOST],
        "seconds": round(seconds, 1),
        "version": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def read(record: Path) -> list[Line]:
    """All lines; the last may be torn by a kill, and is then not there."""
    if not record.exists():
        return []
    text = record.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(lines: Sequence[Line]) -> list[Line]:
    """Of each batch its last line."""
    return list({(line["seed"], line["kind"], line["first"]): line for line in lines}.values())


def append(record: Path, line: Line) -> None:
    """Add a line, in one write, so that several processes may add to one record."""
    record.parent.mkdir(parents=True, exist_ok=True)
    content = record.read_bytes() if record.exists() else b""
    torn = b"" if not content or content.endswith(b"\n") else b"\n"
    if torn:
        record.write_bytes(content[: content.rfind(b"\n") + 1])
    descriptor = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(descriptor)
