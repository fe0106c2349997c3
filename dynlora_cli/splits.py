"""Which rows are held out, and the classes of a classifier."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from dynlora_cli.errors import DataError
from dynlora_cli.tokens import Example


@dataclass(slots=True)
class Kept:
    """An example before the split, with what the counts need."""

    example: Example
    prompt: bytes
    label: str | int | None
    truncated: bool
    cut_answer: bool


def split(rows: list[Kept], share: float, seed: int, notes: list[str]) -> tuple[list[Kept], list[Kept]]:
    """Training and held-out rows.

    Rows of one prompt stay together. Prompts are taken in the order of a hash of seed and prompt, so the choice does
    not depend on the order of the rows; a prompt with more rows than are still wanted is passed over.

    Args:
        rows: all of them.
        share: of the rows to hold out; above 0 at least one prompt is, if there are two.
        seed: of the hash.
        notes: told if nothing can be held out.
    """
    groups = Counter(row.prompt for row in rows)
    order = sorted(groups, key=lambda prompt: hashlib.sha256(b"%d:" % seed + prompt).digest())
    wanted = round(share * len(rows))
    chosen: set[bytes] = set()
    for prompt in order:
        if groups[prompt] <= wanted:
            chosen.add(prompt)
            wanted -= groups[prompt]
    if share > 0 and not chosen and len(groups) > 1:
        chosen.add(min(order, key=lambda prompt: groups[prompt]))
    if share > 0 and not chosen:
        notes.append("no rows held out: all have the same prompt; name a file in dataset.val to measure held-out loss")
    return [row for row in rows if row.prompt not in chosen], [row for row in rows if row.prompt in chosen]


def note_shared(notes: list[str], train: list[Kept], val: list[Kept]) -> None:
    """Tell how many validation rows have a prompt that is trained on."""
    known = {row.prompt for row in train}
    shared = sum(row.prompt in known for row in val)
    if shared:
        notes.append(f"{shared} of {len(val)} validation rows have a prompt that is also in the training rows")


def label_names(rows: list[Kept], num_labels: int | None) -> list[str]:
    """Names of the classes: whole numbers in their own order, then names in theirs.

    Raises:
        DataError: fewer than two classes, or not as many as the recipe announces.
    """
    names = sorted({str(row.label) for row in rows}, key=lambda name: (not name.isdigit(), name.zfill(9), name))
    if len(names) < 2:
        raise DataError(f"dataset.train: a classifier needs two classes, found {', '.join(names) or 'none'}")
    if num_labels is not None and num_labels != len(names):
        shown = ", ".join(names[:10])
        raise DataError(f"model.num_labels is {num_labels}, the training rows have {len(names)} classes: {shown}")
    return names


def number_labels(rows: list[Kept], names: list[str]) -> None:
    """Put the number of its class into each example.

    Raises:
        DataError: a class that the training rows do not have.
    """
    index = {name: number for number, name in enumerate(names)}
    for row in rows:
        if str(row.label) not in index:
            raise DataError(f"the class {row.label!r} is not among those of the training rows: {', '.join(names[:10])}")
        row.example.labels = index[str(row.label)]
