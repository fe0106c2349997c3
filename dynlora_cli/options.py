"""Values of command-line options that are more than a number: budgets and shares, checked before torch is loaded."""

from __future__ import annotations

import re

from dynlora_cli.errors import UsageError
from dynlora_cli.recipe_settings import Budget, parse_budget


def size(text: str, option: str) -> Budget:
    """A budget as on the command line: `8`, `0.5`, `2M`, `auto`.

    Raises:
        UsageError: it is none of these.
    """
    if text == "auto":
        return Budget("auto", 0.0)
    value: object = text
    if re.fullmatch(r"\d+", text):
        value = int(text)
    elif re.fullmatch(r"\d*\.\d+([eE]-?\d+)?|\d+\.\d*|\d+[eE]-?\d+", text):
        value = float(text)
    try:
        return parse_budget(value)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}", f"for example {option} 8, {option} 0.5 or {option} 2M") from None


def share(text: str, option: str) -> float:
    """A share as on the command line: `0.5%` or `0.005`.

    Raises:
        UsageError: it is none, or below 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip().replace(" ", ""))
    if not match:
        raise UsageError(f"{option} {text} is no share", f"for example {option} 0.5%")
    return float(match[1]) / (100 if match[2] else 1)
