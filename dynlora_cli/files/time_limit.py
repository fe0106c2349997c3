"""Anything that somebody else wrote, a template or a regular expression, stopped when its time is over.

limited          a block of Python
matches_in_time  a regular expression
"""

from __future__ import annotations

import ctypes
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dynlora_cli.errors import DynloraError


@contextmanager
def limited(seconds: float, refusal: DynloraError) -> Iterator[None]:
    """Stop the block after so many seconds.

    In the main thread by the clock's signal, which `re` heeds as well. Another thread gets no signals: an exception is
    put into it from outside, which reaches it between two steps of Python, and so never inside a call to C.

    Raises:
        DynloraError: `refusal`, where the time is over.
    """
    in_main = threading.current_thread() is threading.main_thread()
    try:
        with _by_signal(seconds) if in_main else _by_exception(seconds):
            yield
    except _Late:
        raise refusal from None


def matches_in_time(pattern: re.Pattern[str], text: str, seconds: float, refusal: DynloraError) -> bool:
    """Whether a pattern matches from the start of a text.

    `re` holds on to the interpreter while it searches, so outside the main thread nothing could stop it. There the
    package `regex` searches, which looks at the clock itself; transformers brings it.

    Raises:
        DynloraError: `refusal`, where the time is over.
    """
    if threading.current_thread() is threading.main_thread():
        with limited(seconds, refusal):
            return pattern.match(text) is not None
    import regex

    try:
        return regex.match(pattern.pattern, text, timeout=seconds) is not None
    except (TimeoutError, regex.error):  # what it does not understand, `re` did, and may search for ever
        raise refusal from None


class _Late(BaseException):
    """The time is over. No Exception, so that no `except Exception` of the block can keep it."""


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    def stop(_number: int, _frame: object) -> None:
        raise _Late

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    theirs, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if theirs:  # somebody else was waiting for the clock
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, theirs - (time.monotonic() - began)))


@contextmanager
def _by_exception(seconds: float) -> Iterator[None]:
    put_in, thread = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(threading.get_ident())
    lock, done = threading.Lock(), threading.Event()

    def stop() -> None:
        with lock:
            if not done.is_set():
                put_in(thread, ctypes.py_object(_Late))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done.set()
        timer.cancel()
        put_in(thread, None)  # takes back what was put in and has not arrived yet
