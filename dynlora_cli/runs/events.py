"""Events of a run, on their way to whoever listens."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

Emit = Callable[[dict[str, Any]], None]


def send(listener: Emit | None, event: dict[str, Any]) -> None:
    if listener:
        try:
            listener(event)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):  # nobody looks any more: the run goes on all the same
                raise
