"""Libraries below us keep their progress bars and advice to themselves."""

from __future__ import annotations

import logging
import warnings

import transformers


def keep_libraries_quiet() -> None:
    """Their progress bars and advice stay out of our output; what a user must know is an event or an error of ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
