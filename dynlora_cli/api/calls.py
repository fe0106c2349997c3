"""How the functions of the Python face are called: arguments as options take them, work checked and watched."""

from __future__ import annotations

import inspect as signatures
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

if TYPE_CHECKING:
    from dynlora_cli.cli.asked import Work

    PathLike = str | os.PathLike[str]
    Progress = Literal["auto"] | Callable[[dict[str, Any]], None] | None

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, whose arguments are checked and read as the options of its command."""
    signature = signatures.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from dynlora_cli.config.arguments import as_options

        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        as_options(signature, given)
        return function(*given.args, **given.kwargs)

    return call


def done(prepare: Callable[[], Work], progress: Progress) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The summary and the notes of some work, which is checked before anything heavy loads."""
    from dynlora_cli.cli import faults
    from dynlora_cli.cli.views.watching import watched

    with faults.translated():
        work = prepare()
        from dynlora_cli.models.alone import one_at_a_time

        with one_at_a_time, watched(progress) as heard:
            return work(heard), tuple(heard.notes)


def as_path(name: PathLike | None) -> Path | None:
    return None if name is None else Path(name)


def as_text(name: PathLike | None) -> str | None:
    return None if name is None else os.fspath(name)
