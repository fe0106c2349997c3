"""Plain text.

What it does
    Trains on every token, the end-of-text token included. A row of a table is one text. A text file (.txt, .md) is cut
    into consecutive pieces of `max_length` tokens, and only its last piece ends with the end-of-text token.

When to use it
    For continued pretraining: a domain, a style, a language.

Columns
    `text`.

Reference
    https://huggingface.co/docs/transformers/tasks/language_modeling
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.forms import Plain, text_of

COLUMNS = "text"
FORMS = ("Plain",)
PRECEDENCE = 9  # many data sets carry a rendered `text` beside their real columns


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as plain text."""
    return "text" in columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Plain:  # noqa: ARG001 - one signature for all formats
    """The text of a row.

    Args:
        row: the row, columns already renamed.
        has_template: not used; the text is taken as it is.

    Raises:
        BadRowError: the column is missing or no text.
    """
    return Plain(text_of(row, "text"))
