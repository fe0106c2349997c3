"""Two texts, and a number that says how well they belong together.

What it does
    Gives the texts and the score to a model of vectors, which puts pairs with a higher score closer together, or to a
    reranker, which learns the score itself.

When to use it
    With `model.task: embedding` and graded similarities, or with `model.task: reranker`.

Columns
    Two texts: `query` (or `anchor`, `question`, `sentence1`, `text1`) and `passage` (or `document`, `positive`,
    `answer`, `sentence2`, `text2`). Their score, from 0 to 1: `score` (or `label`, `similarity`).

Reference
    https://sbert.net/docs/sentence_transformer/dataset_overview.html
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.columns import mark_of
from dynlora_cli.data.forms import BadRowError, Graded, text_of

COLUMNS = (
    "query|anchor|question|sentence1|text1, passage|document|positive|answer|sentence2|text2, score|label|similarity"
)
FORMS = ("Graded",)
PRECEDENCE = 0

_FIRST = ("query", "anchor", "question", "sentence1", "text1")
_SECOND = ("passage", "document", "positive", "answer", "sentence2", "text2")
_SCORES = ("score", "label", "similarity")


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as two texts and their score."""
    return all(columns & set(names) for names in (_FIRST, _SECOND, _SCORES))


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Graded:  # noqa: ARG001 - one signature for all formats
    """The texts and the score of a row.

    Args:
        row: the row, columns already renamed.
        has_template: not used; the bare texts are read.

    Raises:
        BadRowError: a column is missing, a text is none, or the score is no number from 0 to 1.
    """
    first, second, name = (_first(row, names) for names in (_FIRST, _SECOND, _SCORES))
    score = mark_of(row.get(name))
    if score is None or not 0 <= score <= 1:
        raise BadRowError(
            f"column {name!r} is {row.get(name)!r}, expected a number from 0 to 1 (divide those of another range)"
        )
    return Graded(text_of(row, first), text_of(row, second), score)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), names[0])
