"""What the tests of libraries share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from eval_helpers import foreign

from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.models.quiet import quiet


class Made(NamedTuple):
    """A library with one update, `first`, and an adapter of another tool on the same base that is not in it."""

    root: Path
    run: Path
    base: Path
    other: Path
    rows: Path


def silent(text: str) -> None:
    """Takes what a person would be told."""


def make_library(folder: Path, run: Path) -> Made:
    """Put a finished run into a library in `folder`, and make an adapter as another tool would."""
    base = run.parent / "llama"
    other = foreign(base, folder / "other", target_modules=["q_proj", "up_proj"])
    with quiet:
        add(folder / "lib", Addition(run, name="first", tags=["sorting"]), silent)
    return Made(folder / "lib", run, base, other, run.parent / "llama.jsonl")
