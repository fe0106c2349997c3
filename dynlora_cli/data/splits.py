"""Which rows are dropped and why, which are held out, and the classes of a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe

import re
from collections import Counter
from collections.abc import Sequence, Set

from dynlora_cli.data.examples import Classified
from dynlora_cli.data.rows.choice import shared
from dynlora_cli.data.rows.kept import Kept, KeptRows
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

# Why rows are dropped; `advice_for` knows them again.
LONGER, BEGINS, EMPTY = "longer than max_length", "begins after max_length", "with an empty text or answer"
UNREAD = "longer with the context than the model reads"


def reasons_of(lost: Counter[str]) -> list[str]:
    """How many rows were dropped for each reason, the most frequent first."""
    return [f"{counted(count, 'row')} {reason}" for reason, count in lost.most_common()] or ["all rows are held out"]


def advice_for(reasons: str, limit: int) -> str:
    """What to do where nothing is left to learn from, by the reasons for it."""
    if LONGER in reasons or BEGINS in reasons:
        return f"raise dataset.max_length (now {limit})"
    if UNREAD in reasons:
        return "cut the contexts of the rows into shorter ones, as `dynlora adapt --document` does"
    if "marked" in reasons:
        return "take the marks off, or set dataset.train_on: all"
    return "name the role assistant, or set dataset.train_on: all" if "role" in reasons else "look at the rows"


def note_shared(notes: list[str], train: KeptRows, val: KeptRows) -> None:
    """Tell how many validation rows have a prompt that is trained on."""
    if count := shared(val.prompts, train.prompts):
        notes.append(f"{count} of {len(val)} validation rows have a prompt that is also in the training rows")


def classes_of(labels: Set[str | int | None]) -> list[str]:
    """The classes of rows: whole numbers in their own order, then names in theirs.

    Raises:
        DataError: fewer than two.
    """
    found = sorted({_plain(label) for label in labels}, key=_place)
    if len(found) < 2:
        raise DataError(f"dataset.train: a classifier needs two classes, found {', '.join(found) or 'none'}")
    return found


def class_names(rows: Sequence[Kept], num_labels: int | None, own: list[str] | None, notes: list[str]) -> list[str]:
    """Names of the classes, in the order of the model's outputs.

    A model that has a head for the rows' classes keeps it, and with it its own names and order. Otherwise they are the
    rows': whole numbers in their own order, then names in theirs.

    Args:
        rows: to train on.
        num_labels: as the recipe announces.
        own: classes that the model has a head for, if it has one.
        notes: told where that head is left aside, or answers with more classes than the rows have.

    Raises:
        DataError: fewer than two classes, or not as many as the recipe announces.
    """
    found = classes_of({row.label for row in rows})
    theirs = f"the {len(found)} classes of the rows ({_listed(found)})"
    kept = _kept_classes(found, num_labels, own or [])
    if own and kept and len(found) < len(own):
        notes.append(f"the base model answers with {len(own)} classes ({_listed(own)}): its head is kept for {theirs}")
    if own and not kept:
        notes.append(
            f"the base model has a head for {len(own)} classes ({_listed(own)}), which are not {theirs}: a new head is "
            "trained; to keep the old one, give the rows its names, or its numbers from 0 on"
        )
    names = kept or found
    if num_labels is not None and num_labels != len(names):
        shown = _listed(names)
        raise DataError(f"model.num_labels is {num_labels}, the training rows have {len(names)} classes: {shown}")
    return names


def _kept_classes(found: list[str], num_labels: int | None, own: list[str]) -> list[str]:
    """The model's own classes where the rows use their names or their numbers; none where they do not."""
    numbers = [str(number) for number in range(len(own))]
    if len(own) < 2:
        return []
    if {name.casefold() for name in found} <= {name.casefold() for name in own}:
        return own
    if not set(found) <= set(numbers) or len(own) not in (len(found), num_labels):
        return []
    return numbers if all(re.fullmatch(r"LABEL_\d+", name) for name in own) else own


def number_labels(rows: Sequence[Kept], names: Sequence[str], notes: list[str]) -> None:
    """Put the number of its class into each example.

    Args:
        rows: of a classifier.
        names: of the classes, in the order of the model's outputs.
        notes: told where rows number the classes that have names.

    Raises:
        DataError: a class that the training rows do not have.
    """
    numbered = {} if any(name.isdigit() for name in names) else {str(at): at for at in range(len(names))}
    folded = {_plain(name).casefold(): at for at, name in enumerate(names)}
    index = numbered | folded | {name: at for at, name in enumerate(names)}
    for row in rows:
        label = _plain(row.label)
        at = index.get(label, index.get(label.casefold()))
        if at is None:
            counted = list(names) == [str(number) for number in range(len(names))]  # as of another tool's adapter
            raise DataError(
                f"the class {row.label!r} is not among those of the training rows: {_listed(names)}",
                "write the numbers of the classes into the rows, in the order of the model's outputs"
                if counted
                else None,
            )
        assert isinstance(row.example, Classified)
        row.example.label = at
        if label in numbered:
            shown = ", ".join(f"{at} = {name}" for at, name in enumerate(names[:10]))
            numbered = {}
            notes.append(f"the rows number the classes, which is read in the order of the model's outputs: {shown}")


def _plain(label: str | int | None) -> str:
    """The class in words; numbers that pandas has made decimal are whole again."""
    return re.sub(r"^(\d+)\.0+$", r"\1", str(label))


def _place(name: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order, then names in theirs."""
    is_whole = re.fullmatch(r"-?\d{1,300}", name) is not None
    return not is_whole, int(name) if is_whole else 0, name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


SIZING_ROWS, LEAST_SIZING_ROWS = 64, 8  # to choose the rank by


def sizing_rows(recipe: Recipe) -> int:
    """How many training rows are held out to choose the rank by."""
    return SIZING_ROWS if recipe.rank.parsed_budget().kind == "auto" else 0
