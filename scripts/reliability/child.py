"""A dynlora command in a process of its own, in which something goes wrong at a chosen moment.

The process is a fork of this one, which has loaded torch already: a command takes a second or two, not ten.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .trial import Lost

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
HUNG = 120.0
Fault = Callable[[], None]


class Answer(NamedTuple):
    """How a command ended: its exit code, or minus the signal that ended it, and what it said to people."""

    code: int
    said: str

    @property
    def killed(self) -> bool:
        return self.code < 0

    def must(self, *codes: int) -> Answer:
        """Itself, where it ended with one of these codes and without a traceback.

        Raises:
            Lost: it did not.
        """
        if self.code not in codes or "Traceback" in self.said:
            raise Lost(f"exit code {self.code}, expected {' or '.join(map(str, codes))}: {self.said[-1500:]}")
        return self


def start(arguments: Sequence[object], log: Path, fault: Fault | None = None, cwd: Path | None = None) -> int:
    """Start `dynlora ARGUMENTS`; returns the process, which leads a session of its own.

    Args:
        arguments: of the command line.
        log: takes what it says.
        fault: is called in the new process before the command begins.
        cwd: where it runs.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(stream, number)
        os.environ.update(COLUMNS="400")
        os.chdir(cwd or log.parent)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from dynlora_cli.cli.app import main

        sys.argv = ["dynlora", *map(str, arguments)]
        if fault:
            fault()
        main(sys.argv[1:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    raise AssertionError("a child does not come here")


def end_of(child: int, log: Path, *, kill_after: float | None = None, seconds: float = HUNG) -> Answer:
    """Wait for a process of `start`.

    Args:
        child: the process.
        log: what it says.
        kill_after: seconds after which it is killed, if it still runs.
        seconds: after which it counts as hung.

    Raises:
        Lost: it hangs.
    """
    began, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Answer(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"))
        passed = time.monotonic() - began
        if kill_after is not None and passed >= kill_after and not killed:
            killed = True
            os.killpg(child, signal.SIGKILL)
        elif passed >= seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Lost(f"it hangs: nothing after {seconds:.0f} s; {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.005)


def command(arguments: Sequence[object], work: Path, fault: Fault | None = None, **wait: Any) -> Answer:
    """Run `dynlora ARGUMENTS` in a folder to its end, see `start` and `end_of`."""
    log = work / f".said-{os.getpid()}-{time.monotonic_ns()}"
    child = start(arguments, log, fault, work)
    try:
        return end_of(child, log, **wait)
    finally:
        log.unlink(missing_ok=True)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def on_change(act: Callable[[int, str], None]) -> Fault:
    """A fault that calls `act` before every change of names on the disk and every opening of a file to be written.

    Args:
        act: is given the number of the change, from 1, and the path.
    """

    def install() -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in CHANGES or (event == "open" and _writes(arguments)):
                count += 1
                act(count, os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else "")

        sys.addaudithook(hook)

    return install


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = arguments
    if isinstance(path, int) or (isinstance(path, (str, bytes)) and os.fspath(path) in ("/dev/null", b"/dev/null")):
        return False
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITES)


def kill_at_change(number: int) -> Fault:
    """Killed before its change to the disk of this number, from 1."""

    def act(count: int, path: str) -> None:  # noqa: ARG001
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_change(act)


def kill_at_path(part: str) -> Fault:
    """Killed before the first change of a path that holds this text."""

    def act(count: int, path: str) -> None:  # noqa: ARG001
        if part in path:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_change(act)


def kill_at_byte(size: int) -> Fault:
    """Killed in the middle of a write: when the first file would grow beyond so many bytes, which it then has."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install


def changes_of(arguments: Sequence[object], work: Path) -> int:
    """How many changes to the disk a command makes that nothing befalls."""
    tally = work / ".changes"
    descriptor = os.open(tally, os.O_CREAT | os.O_WRONLY)
    answer = command(arguments, work, on_change(lambda count, _: os.pwrite(descriptor, b"%9d" % count, 0) and None))
    os.close(descriptor)
    answer.must(0)
    found = int(tally.read_text())
    tally.unlink()
    return found
