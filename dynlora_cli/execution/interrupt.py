"""Ctrl-C, SIGTERM and SIGHUP as a request that is honoured at the next good moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

_here = local()  # what asks the work of this thread to stop, where it can be asked
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def heeded() -> list[int]:
    """The signals that ask for a stop; one that is ignored, as SIGHUP under nohup, stays so."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class Stop:
    """Whether somebody has asked for a stop: call it.

    Attributes:
        signal: the one that asked, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._terminals = _open_terminals()

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def by_keyboard(self) -> bool:
        """Whether it was Ctrl-C."""
        return self.signal == signal.SIGINT

    def ask(self, number: int, _frame: object) -> None:
        """The handler of signals.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        _leave(self._terminals)
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Let Ctrl-C, SIGTERM and a closed terminal ask for a stop; a second time stops at once."""
    stop, outer = Stop(), getattr(_here, "stop", None)
    try:
        before = {number: signal.signal(number, stop.ask) for number in heeded()}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    _here.stop = stop
    try:
        yield stop
    finally:
        _here.stop = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_here() -> bool:
    """Ask what this thread works at to stop at the next good moment, as Ctrl-C would; False where nothing can be asked.

    For code that the work calls, such as a listener of events: no signal reaches a thread that is not the main one.
    """
    stop: Stop | None = getattr(_here, "stop", None)
    if stop is not None and stop.signal is None:
        stop.signal = signal.SIGINT
    return stop is not None


def _open_terminals() -> list[int]:
    """Where output goes to a terminal, which may be closed."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def _leave(terminals: list[int]) -> None:
    """Send output to nowhere when the terminal was closed: every write to it would fail, and the save with it."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    terminals[:] = [descriptor for descriptor in terminals if os.isatty(descriptor)]
