"""Changes that a run makes to a model or to the process, and how each is undone when the run is over.

Patches   what one run has changed on its model, such as a module's `forward`
Held      a setting of the whole process, such as a filter of warnings, which several runs may need at once
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack
from threading import RLock
from typing import Any

_ABSENT = object()


class Patches(ExitStack):
    """All changes of one run; leaving the `with` block, or `close`, undoes them, the latest first.

    It is an ExitStack: `callback(function)` notes any other way to undo something, `enter_context` holds a `Held`.
    """

    def set(self, holder: object, name: str, value: Any) -> None:
        """Give an object an attribute of its own, such as a module its own `forward`."""
        own = vars(holder)
        before = own.get(name, _ABSENT)
        own[name] = value
        self.callback(_put_back, own, name, before)


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is _ABSENT:
        own.pop(name, None)
    else:
        own[name] = before


class Held(ContextDecorator):
    """A setting of the process, changed while anybody is inside `with held:` and put back by the last who leaves.

    Unlike a stack of contexts, it does not mind in which order several runs begin and end, nor in which threads.

    Args:
        change: makes the setting, whether or not it is made already, and returns a function that undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change, self._holders, self._lock = change, 0, RLock()

    def __enter__(self) -> None:
        with self._lock:
            undo = self._change()
            if not self._holders:
                self._undo = undo
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._undo()


def ignore_warnings(message: str = "", category: type[Warning] = Warning) -> Callable[[], None]:
    """Ignore some warnings in the whole process; returns what takes this filter, and no other, away again.

    A filter that was there already comes to the front of the list, so it is put back where it stood, seen from the end:
    others are added at the front.
    """
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", message, category)
    added = warnings.filters[0]
    from_end = len(before) - before.index(added) if added in before else None

    def undo() -> None:
        filters: Any = warnings.filters
        if added in filters:
            filters.remove(added)
            if from_end is not None:
                filters.insert(max(0, len(filters) + 1 - from_end), added)

    return undo


# In the place of `warnings.catch_warnings`, which puts back all filters: also those that another thread has changed.
no_warnings = Held(ignore_warnings)
