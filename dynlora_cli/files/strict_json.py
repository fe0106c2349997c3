"""JSON of other people's files: whatever is wrong with a text, `loads` says it in one way, and in words.

The standard library reads a repeated key as its last value, and answers numbers and depths beyond its limits with
errors that are none of JSON.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

DEEPEST = 200  # levels; templates and hashes walk through what was read, one call a level


class BadJsonError(ValueError):
    """A text is no JSON that can be used.

    Args:
        reason: what is wrong, such as `not valid JSON (Expecting value, column 3)`.
        line: of the text, counted from 1; 0: nobody knows.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        BadJsonError: it is not valid, has a key twice in one object, or a number or a depth beyond all use.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise BadJsonError(f"not valid JSON ({error.msg}, column {error.colno})", error.lineno) from None
    except BadJsonError:
        raise
    except RecursionError:
        raise BadJsonError(f"JSON nested more than {DEEPEST} deep") from None
    except ValueError:
        run = max(re.finditer(r"\d+", text), key=lambda run: len(run[0]))
        reason = f"JSON with a whole number of {len(run[0])} digits, more than {sys.get_int_max_str_digits()}"
        raise BadJsonError(reason, text.count("\n", 0, run.start()) + 1) from None
    if text.count("[") + text.count("{") > DEEPEST and depth(value) > DEEPEST:
        raise BadJsonError(f"JSON nested more than {DEEPEST} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadJsonError(f"JSON with the key {twice!a} twice in one object")
    return found


def depth(value: Any) -> int:
    """Levels of lists and objects, found without recursion."""
    level, levels = [value], 0
    while level := [part for part in level if isinstance(part, (list, dict))]:
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
        levels += 1
    return levels
