"""What `rank.budget` may say: an average rank, a share, parameters, bytes of the file, or that the run finds out."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from dynlora_cli.text import show

LOWEST_AUTO = 0.25  # average rank at which an automatic budget stops in any case
MAX_RANK = 100_000  # wider than any layer: whoever writes more means parameters
MOST = 1e12  # parameters: whoever writes 5000B means bytes
BUDGET_FORMS = (
    "an average rank (a whole number from 1), a share of the start between 0 and 1, a parameter count like 2M, "
    "bytes of the file like 200kB, or auto"
)
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Budget(NamedTuple):
    """What may live at the end: `value` is an average rank, a share of the start, parameters, or bytes of the file."""

    kind: Literal["rank", "share", "parameters", "bytes", "auto"]
    value: float


def parse_budget(value: object) -> Budget:
    """The parsed form of `rank.budget`.

    Raises:
        ValueError: the value is none of these forms; the text names them.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgKMG]i?[bB])", value) if isinstance(value, str) else None
    if size and (asked := int(float(size[1]) * UNITS[size[2].lower()])) >= 1:
        return Budget("bytes", asked)
    count = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB])", value) if isinstance(value, str) else None
    parameters = float(count[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[count[2].lower()] if count else 0.0
    if parameters > MOST:
        raise ValueError(
            f"got {show(value)}, more parameters than any adapter has; bytes of the file are written in kB"
        )
    if parameters >= 1:
        return Budget("parameters", parameters)
    if isinstance(value, float) and value.is_integer() and value > 1:  # but 1.0: all of the start, or rank 1?
        value = int(value)
    if isinstance(value, float) and 0 < value < 1:
        return Budget("share", value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        if value > MAX_RANK:
            raise ValueError(f"got {value}, too high for an average rank; a parameter count is written like 2M or 500k")
        return Budget("rank", value)
    if value == "auto":
        return Budget("auto", LOWEST_AUTO)
    raise ValueError(f"got {show(value)}, must be {BUDGET_FORMS}")
