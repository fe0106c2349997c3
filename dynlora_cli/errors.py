"""The errors that a person may meet, and the exit code of each.

    DynloraError             1    the run failed
    ├── UsageError           2    change the command, the recipe or the named input
    │   ├── RecipeError      2      one or more problems in a recipe, all reported at once
    │   └── DataError        2      rows that cannot be trained on
    ├── MachineError         3    change the machine, or fetch what is missing (package, model, data, disk)
    ├── MeasureError         4    a measured number failed (NaN, a threshold)
    └── Interrupted        130    stopped by Ctrl-C after a clean checkpoint

A message says what is wrong and where; `hint` says what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SECRETS = (
    (re.compile(r"(\b[\w+.-]+://)[^\s/@'\"]+@"), r"\1***@"),
    (
        re.compile(r"([?&#][\w.-]*(?:token|key|secret|passw|sig|auth|credential)[\w.-]*=)[^&\s'\"),<]+", re.IGNORECASE),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # which a terminal would obey


def without_secrets(text: str) -> str:
    """A text that may be shown: names and tokens in addresses are left out, control characters written out."""
    for secret, stand_in in _SECRETS:
        text = secret.sub(stand_in, text)
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class DynloraError(Exception):
    """Base of all errors that are reported without a traceback.

    Args:
        message: what is wrong, and where.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        message = without_secrets(message)
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else without_secrets(hint)


class UsageError(DynloraError):
    """The command, the recipe or a named input must change."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has problems; `problems` holds one line for each, `message` all of them.

    Args:
        problems: one text per problem, each with file, line, value and what is allowed.
        hint: what to do next.
    """

    def __init__(self, problems: Sequence[str], hint: str | None = None) -> None:
        self.problems = [without_secrets(problem) for problem in problems]
        super().__init__("\n".join(self.problems), hint)


class DataError(UsageError):
    """The rows cannot be trained on."""


class MachineError(DynloraError):
    """The machine lacks something: a package, a model, data, disk space, a device."""

    exit_code = 3


class MeasureError(DynloraError):
    """A measured number failed: NaN, a threshold."""

    exit_code = 4


class Interrupted(DynloraError):  # noqa: N818 - it is a way to end, not a fault
    """The run was stopped by Ctrl-C and has saved its state."""

    exit_code = 130
