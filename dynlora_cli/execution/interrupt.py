"""Ctrl-C, SIGTERM and SIGHUP as a request that is honoured at the next good moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def heeded() -> list[int]:
    """The signals that ask for a stop; one that is ignored, as SIGHUP under nohup, stays so."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C, SIGTERM and a closed terminal ask for a stop; a second time stops at once."""
    asked: list[int] = []

    terminals = open_terminals()

    def ask(number: int, _frame: object) -> None:
        leave(terminals)
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in heeded()}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_terminals() -> list[int]:
    """Where output goes to a terminal, which may be closed."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def leave(terminals: list[int]) -> None:
    """Send output to nowhere when the terminal was closed: every write to it would fail, and the save with it."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    terminals[:] = [descriptor for descriptor in terminals if os.isatty(descriptor)]
