"""A question about a text, and its answer.

What it does
    For `train.objective: context-distillation`. A teacher reads the context before the prompt; what is trained reads
    the prompt alone, as a conversation where the model has a chat template (`dataset.chat`).

When to use it
    To write what a text says into an adapter. Under any other objective the columns `prompt` and `completion` of the
    same rows are read, and the context is not.

Columns
    `context`: the text that the question is about; empty where it is about none, and the answer is to stay as it is.
    `prompt`, `completion`: as of the format completion. `dynlora adapt` has a model write both.

Reference
    Snell et al. 2022, Learning by Distilling Context (arXiv 2209.15189).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.data.forms import BadRowError, Grounded, optional_text

COLUMNS = "context, prompt, completion"
FORMS = ("Grounded",)
PRECEDENCE = 1


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as questions about a text; one without an answer is told so."""
    return {"context", "prompt"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Grounded:
    """The context of a row, its prompt and its completion.

    Args:
        row: the row, columns already renamed.
        has_template: whether prompt and completion become a conversation.

    Raises:
        BadRowError: a column is missing or no text.
    """
    if row.get("completion") in (None, "", []):
        raise BadRowError(
            "there is no 'completion'; `dynlora adapt --model MODEL --data FILE` has the model answer with the context "
            "before it, and trains on that"
        )
    said = plugins.load("formats", "completion").to_example(row, has_template=has_template)
    return Grounded(optional_text(row, "context"), said)
