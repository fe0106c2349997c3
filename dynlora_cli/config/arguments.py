"""What Python gives as arguments, in the form that the commands' options take, or refused with its name.

A shell gives text, which typer reads. Python gives anything: NumPy's numbers, paths that begin with ~, None.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError

PLACES = {"out", "output_dir", "resume_from", "data", "library", "base", "model"}
WORDS = {"policy", "into", "method", "base_weights", "dtype", "to", "outtype"}
SWITCHES = {
    "overwrite", "resume", "trust_remote_code", "measure", "no_base", "allow_template_mismatch", "add_chunks",
}  # fmt: skip
WHOLE = {
    "heal": 0, "max_samples": 1, "generate": 0, "samples": 0, "limit": 1, "seed": 0, "questions": 1, "chunk_tokens": 1,
    "answer_tokens": 1,
}  # and the least of each  # fmt: skip
NUMBERS = {"density", "max_kl", "teacher"}
SIZES = {"budget", "tolerance", "max_changed"}  # as text or as a number


def as_options(signature: inspect.Signature, given: inspect.BoundArguments) -> None:
    """Put arguments of a function of the Python face in the form that options take.

    Raises:
        UsageError: one of them is of another kind; the message names it.
    """
    for name, value in given.arguments.items():
        if value is not None or signature.parameters[name].default is not None:
            given.arguments[name] = option(name, value)


def option(name: str, value: Any) -> Any:
    """One argument in the form that the option takes; those that have none here are returned as they are.

    Raises:
        UsageError: it is of another kind.
    """
    if name in PLACES:
        return place(name, value)
    if name in WORDS and not isinstance(value, str):
        raise _refused(name, value, "a text")
    if name in WHOLE:
        return _whole(name, value, WHOLE[name])
    if name in NUMBERS:
        return number(name, value)
    if name in SIZES and not isinstance(value, str):
        return number(name, value, "a number, or a text such as '2M' or '0.5%'")
    if name in SWITCHES:
        value = scalar(value)
        if not isinstance(value, bool):
            raise _refused(name, value, "True or False")
    if name == "weights" and not isinstance(value, str):
        return [number(name, one) for one in several(name, value, "a number for each adapter")]
    if name == "also":
        if not isinstance(value, Mapping):
            raise _refused(name, value, "files by name, such as {'general': 'general.jsonl'}")
        return {str(one): place(f"{name}, {one}", file) for one, file in value.items()}
    if name == "document":
        paths = [value] if isinstance(value, (str, os.PathLike)) else several(name, value, "a path, or several")
        return [place(name, one) for one in paths]
    if name == "columns" and not isinstance(value, Mapping):
        raise _refused(name, value, "our names to the data's, such as {'prompt': 'question'}")
    if name == "tasks":
        names = [value] if isinstance(value, str) else several(name, value, "names of tasks")
        return [one if isinstance(one, str) else place(name, one) for one in names]
    return value


def place(name: str, value: Any) -> str:
    """A path, or the name of something that may be one; ~ is the home folder.

    Raises:
        UsageError: it is none.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(text, str) or not text:
        raise _refused(name, value, "a path")
    try:
        return os.fspath(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UsageError(f"{name}: {text}: this machine has no such user", "write the path out") from None


def number(name: str, value: Any, must: str = "a number") -> int | float:
    """A number of Python's own.

    Raises:
        UsageError: it is none, or no finite one.
    """
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refused(name, value, must)
    return value


def scalar(value: Any) -> Any:
    """NumPy's or torch's single numbers as Python's own; anything else as it is."""
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def several(name: str, value: Any, what: str) -> list[Any]:
    """Some values as a list.

    Raises:
        UsageError: it is a single one.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refused(name, value, what)
    return list(value)


def _whole(name: str, value: Any, least: int) -> int:
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refused(name, value, f"a whole number from {least}")
    return value


def _refused(name: str, value: Any, must: str) -> UsageError:
    plain = value is None or isinstance(value, (str, bool, int, float))
    found = repr(value) if plain and len(repr(value)) <= 80 else f"a {type(value).__name__}"
    return UsageError(f"{name}: got {found}, must be {must}", f"change the argument {name}")
