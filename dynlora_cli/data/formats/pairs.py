"""A query, the passage that answers it, and passages that do not.

What it does
    Gives the texts to a model of vectors. The passages of other rows are wrong answers, too; `negative` adds some that
    are hard to tell from the right one, in one column, in a list, or in `negative_1` to `negative_9`.

When to use it
    With `model.task: embedding`.

Columns
    `query` (or `anchor`, `question`) and `positive` (or `passage`, `document`, `context`, `answer`); optional
    `negative`, `negatives` (a list), `negative_1` ...

Reference
    https://sbert.net/docs/sentence_transformer/dataset_overview.html
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.forms import BadRowError, Related, text_of

COLUMNS = "query|anchor|question, positive|passage|document|context|answer [negative, negatives, negative_1 ...]"
FORMS = ("Related",)
PRECEDENCE = 1
ALSO = tuple(f"negative_{number}" for number in range(1, 10))  # columns that it reads besides

_QUERIES = ("query", "anchor", "question")
_PASSAGES = ("positive", "passage", "document", "context", "answer")


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as a query and its passage."""
    return bool(columns & set(_QUERIES)) and bool(columns & set(_PASSAGES))


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Related:  # noqa: ARG001 - one signature for all formats
    """The texts of a row.

    Args:
        row: the row, columns already renamed.
        has_template: not used; the bare texts are read.

    Raises:
        BadRowError: a column is missing or no text.
    """
    query, passage = _first(row, _QUERIES), _first(row, _PASSAGES)
    return Related(text_of(row, query), text_of(row, passage), tuple(_negatives(row)))


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), names[0])


def _negatives(row: Mapping[str, Any]) -> list[str]:
    """All of them, column by column; an empty column has none."""
    found = []
    for name in ("negative", "negatives", *ALSO):
        value = row.get(name)
        for text in value if isinstance(value, list) else [value]:
            if text in (None, ""):
                continue
            if not isinstance(text, str):
                raise BadRowError(f"column {name!r} holds {type(text).__name__}, expected text")
            found.append(text)
    return found
