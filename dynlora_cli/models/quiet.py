"""Libraries below us keep their progress bars and advice to themselves while one of our commands runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import transformers

from dynlora_cli.models.patched import Held, ignore_warnings


def _silence() -> Callable[[], None]:
    theirs, bitsandbytes = transformers.logging, logging.getLogger("bitsandbytes")
    verbosity, bars, level = theirs.get_verbosity(), theirs.is_progress_bar_enabled(), bitsandbytes.level
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)
    unfilter = ignore_warnings(category=FutureWarning)

    def undo() -> None:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
        bitsandbytes.setLevel(level)
        unfilter()

    return undo


# What a person must know of all this is an event or an error of ours. `with quiet:`, or `@quiet` above a function.
quiet = Held(_silence)
