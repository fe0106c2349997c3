"""Runs one command in several processes that train together, one per device of this machine.

torchrun does the same, but ends with its own exit code and a page of its own traceback where the command has already
said what is wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Seconds for the others to end by themselves when one has failed; they may be waiting for it.
GRACE = 10.0


def run_together(command: Sequence[str], count: int, *, gpus: bool) -> int:
    """Run a command `count` times, joined by the environment variables that torch.distributed reads.

    Args:
        command: program and arguments.
        count: number of processes.
        gpus: one GPU for each; otherwise they share the processor cores.

    Returns:
        The exit code of the first process that failed, or 0.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    threads = max(1, (os.cpu_count() or 1) // count)
    defaults = {"OMP_NUM_THREADS": str(threads), **({} if gpus else {"ACCELERATE_USE_CPU": "true"})}
    # In sessions of their own, so that Ctrl-C reaches them once: from us.
    processes = [
        subprocess.Popen(
            command,
            env={**defaults, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]
    with _signals_passed_on(processes):
        return _wait(processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _signals_passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails the others get a little time, and are then killed."""
    code, deadline = 0, None
    while any(process.poll() is None for process in processes):
        code = code or next((process.returncode for process in processes if process.returncode), 0)
        deadline = deadline or (time.monotonic() + GRACE if code else None)
        if deadline and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code
