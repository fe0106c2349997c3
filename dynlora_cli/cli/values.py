"""Values of options that are more than a number: budgets and shares, checked before torch is loaded.

As text from the command line, or as the number itself from Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dynlora_cli.config.budget import Budget, parse_budget
from dynlora_cli.config.dtypes import BYTES, FULL, OF_IMAGES
from dynlora_cli.errors import UsageError
from dynlora_cli.text import did_you_mean

METHODS = ("exact", "linear", "ties", "dare", "svd")  # of merge, in the order in which they are shown


def choice(text: str, choices: Sequence[str], option: str) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        UsageError: it is not; the message names them, and the nearest.
    """
    if text not in choices:
        raise UsageError(
            f"{option} {text}: there is none{did_you_mean(text, choices)}", f"choose one of: {', '.join(choices)}"
        )


def saved_dtype(text: str | None, *, images: bool = False) -> str:
    """A number format of saved factors; float32 where none is named.

    Args:
        text: its name.
        images: those of adapters for pipelines are meant as well.

    Raises:
        UsageError: there is no such format.
    """
    choice(text or FULL, tuple(dict.fromkeys((*BYTES, *OF_IMAGES)) if images else BYTES), "--dtype")
    return text or FULL


def numbers(text: str | Sequence[float], option: str) -> list[float]:
    """Numbers with commas between them, or some already.

    Raises:
        UsageError: one of them is no number.
    """
    try:
        return [float(word) for word in (text.split(",") if isinstance(text, str) else text)]
    except (TypeError, ValueError):
        raise UsageError(f"{option} {text}: not all are numbers", f"for example {option} 0.7,0.3") from None


def size(text: str | float, option: str, *, auto: bool = True, in_bytes: bool = True) -> Budget:
    """A budget as on the command line: `8`, `0.5`, `2M`, with `in_bytes` `200kB`, and with `auto` the word.

    Raises:
        UsageError: it is none of these.
    """
    if text == "auto" and auto:
        return Budget("auto", 0.0)
    value: object = text
    if not isinstance(text, str):
        pass
    elif re.fullmatch(r"\d+", text):
        value = int(text)
    elif re.fullmatch(r"\d*\.\d+([eE]-?\d+)?|\d+\.\d*|\d+[eE]-?\d+", text):
        value = float(text)
    try:
        found = parse_budget(value)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}", f"for example {option} 8, {option} 0.5 or {option} 2M") from None
    if found.kind == "bytes" and not in_bytes:
        raise UsageError(f"{option} {text}: bytes are for train and prune", f"for example {option} 8 or {option} 2M")
    return found


def share(text: str | float, option: str) -> float:
    """A share as on the command line: `0.5%` or `0.005`.

    Raises:
        UsageError: it is none, or below 0.
    """
    if not isinstance(text, str) and 0 <= text < math.inf:
        return float(text)
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", str(text).strip().replace(" ", ""))
    if not match:
        raise UsageError(f"{option} {text} is no share", f"for example {option} 0.5%")
    return float(match[1]) / (100 if match[2] else 1)


def column_names(text: str) -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping."""
    named = {}
    for part in text.split(","):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not (ours and equals and theirs):
            raise UsageError(
                f"--columns {text}: {part!r} is not OURS=THEIRS",
                f"such as {ours or 'prompt'}=NAME, where NAME is a column of the data; commas go between several",
            )
        named[ours] = theirs
    return named
