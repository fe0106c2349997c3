"""A prompt and its completion.

What it does
    Joins the two texts as they are, adds the end-of-text token, and puts the loss on the completion and that token.
    The prompt is tokenised alone, just as it will be when the model is served.

When to use it
    For a base model without a chat template, and wherever you want full control of the text.

Columns
    `prompt`, `completion`.

Reference
    The prompt/completion form of OpenAI's first fine-tuning API, also read by TRL and mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.formats._forms import Pair, text_of

COLUMNS = "prompt, completion"
TASKS = ("causal-lm", "seq2seq-lm")
PRECEDENCE = 2


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as prompt and completion."""
    return {"prompt", "completion"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Pair:  # noqa: ARG001 - one signature for all formats
    """The prompt and the completion of a row.

    Args:
        row: the row, columns already renamed.
        has_template: not used; the text is taken as it is.

    Raises:
        BadRowError: a column is missing or no text.
    """
    return Pair(text_of(row, "prompt"), text_of(row, "completion"))
