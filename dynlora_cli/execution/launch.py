"""One command in several processes, one per device.

Why not `torchrun`: it ends with exit code 1 whatever the reason, prints a traceback of its own over our message, and
hands a Ctrl-C from the terminal to processes that got it already, which they must take for the second one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from dynlora_cli.errors import DynloraError
from dynlora_cli.execution.cores import THREADS, threads_of_each
from dynlora_cli.execution.interrupt import heeded

# After one process has failed, the others have the longer time to end by themselves. They have the shorter one where
# there is nothing to wait for: a process was killed, so the others cannot go on, or the first one has failed, which
# prints and saves for all.
GRACE_SECONDS, SHORT_GRACE_SECONDS = 15.0, 3.0
LAUNCHER = "DYNLORA_LAUNCHER"  # environment variable that tells a launched process the launcher's id
RUN_ID = "TORCHELASTIC_RUN_ID"  # the same of torchrun: its job's id
LOST_OTHERS = 75  # exit code for the launcher: this process ended because another one did
PATIENCE_SECONDS = 60.0  # how long a process may take to save and end after its launcher has died


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python -m dynlora_cli ARGUMENTS` in `count` processes that find each other through torch.distributed.

    The first one speaks for all. What another wrote is shown only if that one failed and the first was silent.

    Args:
        arguments: of the command line.
        count: processes, all on this machine.

    Returns:
        The exit code of the one that failed first; 0 if none did.

    Raises:
        DynloraError: one was killed.
    """
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(count - 1)]
        processes = _start(arguments, count, [[None, None], *files])
        before = {number: signal.signal(number, lambda n, _: _send(processes, n)) for number in heeded()}
        try:
            failed, silent = _wait(processes)
            code = 0 if failed is None else processes[failed].returncode
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _send(processes, signal.SIGKILL)
        if failed is None:
            return 0
        if failed and silent:
            for file, stream in zip(files[failed - 1], (sys.stdout, sys.stderr), strict=True):
                file.seek(0)
                shutil.copyfileobj(file, stream.buffer)
                stream.flush()
        if code < 0:
            raise _killed(failed, -code)
        return code


def _killed(rank: int, number: int) -> DynloraError:
    guess = " (out of memory?)" if number == getattr(signal, "SIGKILL", None) else ""
    less = "; where memory was short, lower train.micro_batch_size or dataset.max_length first" if guess else ""
    return DynloraError(f"process {rank} was killed by signal {number}{guess}", f"go on with --resume{less}")


def is_main_process() -> bool:
    """Whether this is the one process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def _start(
    arguments: Sequence[str], count: int, outputs: Sequence[Sequence[IO[bytes] | None]]
) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        LAUNCHER: str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        THREADS: threads_of_each(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dynlora_cli", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # so that a Ctrl-C comes through us, and once
        )
        for rank, (stdout, stderr) in enumerate(outputs)
    ]


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int | None, bool]:
    """Wait for all: the rank of the process that is to blame (None: all are done), and whether rank 0 was silent."""
    failed: list[int] = []  # in the order in which they ended
    until = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
        until = min(until, time.monotonic() + _note_failures(processes, failed))
    _note_failures(processes, failed)
    codes = [process.returncode for process in processes]
    # To blame is first a process that was killed (its code is negative), then one with an error of its own, and last
    # one that only lost the others.
    blamed = sorted(failed, key=lambda rank: (codes[rank] > 0, codes[rank] == LOST_OTHERS))
    return (blamed[0] if blamed else None), codes[0] in (None, LOST_OTHERS)


def _note_failures(processes: Sequence[subprocess.Popen[bytes]], failed: list[int]) -> float:
    """Add to `failed` the ranks that have failed meanwhile. Returns how many seconds the others have to end."""
    failed += [rank for rank, process in enumerate(processes) if process.poll() and rank not in failed]
    if not failed:
        return float("inf")
    short = any(rank == 0 or processes[rank].returncode < 0 for rank in failed)
    return SHORT_GRACE_SECONDS if short else GRACE_SECONDS


# -- in the launched processes ---------------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Watch what started this process, if it is `launch` or torchrun: when that is gone, save and end as after SIGTERM.

    Otherwise it would train on where nobody looks, and hold its GPU and its folder.
    """
    launcher = int(os.environ.get(LAUNCHER) or (os.getppid() if RUN_ID in os.environ else 0))
    if launcher and hasattr(os, "getppid"):
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)  # it still waits for other processes, which do not answer


def is_launched() -> bool:
    """Whether this process was started by `launch`, which reports its end."""
    return LAUNCHER in os.environ
