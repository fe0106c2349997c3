"""A text and its class.

What it does
    Gives the text, or a pair of texts, to a classifier. Classes may be names or whole numbers. A model that was trained
    on the same classes keeps its order of them; otherwise they are sorted. The list is saved with the adapter.

When to use it
    With `model.task: sequence-classification`.

Columns
    `text`, `label`; optional `text_pair`.

Reference
    https://huggingface.co/docs/transformers/tasks/sequence_classification
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.forms import BadRowError, Labelled, text_of

COLUMNS = "text, label [text_pair]"
FORMS = ("Labelled",)
PRECEDENCE = 0

_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?")


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as labelled text."""
    return {"text", "label"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Labelled:  # noqa: ARG001 - one signature for all formats
    """The text and the class of a row.

    Args:
        row: the row, columns already renamed.
        has_template: not used; a classifier reads the bare text.

    Raises:
        BadRowError: a column is missing, the text is no text, or the class is neither text nor a whole number.
    """
    label = row.get("label")
    if isinstance(label, float) or (isinstance(label, str) and _DECIMAL.fullmatch(label)):
        if not float(label).is_integer():  # the same in every kind of file: a CSV has text only
            raise BadRowError(
                f"column 'label' is {label}, a number on a scale and no class; name ranges, such as 'high'"
            )
        label = int(float(label))
    if not isinstance(label, str | int) or label == "":
        shown = "missing, null or empty" if label in (None, "") else f"of type {type(label).__name__}"
        raise BadRowError(f"column 'label' is {shown}, expected a name or a whole number")
    pair = None if row.get("text_pair") is None else text_of(row, "text_pair")
    return Labelled(text_of(row, "text"), pair, label)
