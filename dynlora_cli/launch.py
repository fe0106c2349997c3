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
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

# After one process has failed, the others have this long to end by themselves.
GRACE_SECONDS = 15.0
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python -m dynlora_cli ARGUMENTS` in `count` processes that find each other through torch.distributed.

    The first one speaks for all. What another wrote is shown only if that one failed and the first was silent.

    Args:
        arguments: of the command line.
        count: processes, all on this machine.

    Returns:
        The exit code of the one that failed first; 0 if none did.
    """
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(count - 1)]
        processes = _start(arguments, count, [[None, None], *files])
        before = {number: signal.signal(number, lambda n, _: _send(processes, n)) for number in SIGNALS}
        try:
            failed, silent = _wait(processes)
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
        code = processes[failed].returncode
        return code if code > 0 else 128 - code


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
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
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
    """The process that failed first (None: all are done), and whether the first process was killed in its silence."""
    failed, until = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
            until = float("inf") if failed is None else time.monotonic() + GRACE_SECONDS
    if failed is None:
        failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
    return failed, processes[0].poll() is None
