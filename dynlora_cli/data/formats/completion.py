"""A prompt and its completion.

What it does
    Becomes a conversation of two turns where the model has a chat template (`dataset.chat`), so that training and
    serving use the same text. Otherwise the two texts are joined as they are, the end-of-text token is added, and the
    loss is on the completion and that token; the prompt is tokenised alone, as it will be when the model is served.

When to use it
    For questions and answers; with `dataset.chat: false` wherever you want full control of the text.

Columns
    `prompt`, `completion`: two texts; of several right answers in a list the first is learned. Or two lists of
    messages, as TRL has them, of which the second trains.

Reference
    The prompt/completion form of OpenAI's first fine-tuning API, also read by TRL and mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.data.forms import BadRowError, Pair, Turns, first_answer, text_of

COLUMNS = "prompt, completion"
FORMS = ("Turns", "Pair")
PRECEDENCE = 2


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as prompt and completion."""
    return {"prompt", "completion"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Turns | Pair:
    """The prompt and the completion of a row.

    Args:
        row: the row, columns already renamed.
        has_template: whether the row becomes a conversation.

    Raises:
        BadRowError: a column is missing or no text.
    """
    if isinstance(row.get("prompt"), list):
        return _conversation(row["prompt"], row.get("completion"), has_template)
    prompt, completion = text_of(row, "prompt"), text_of(first_answer(row), "completion")
    if has_template:
        return Turns([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    return Pair(prompt, completion)


def _conversation(prompt: list[Any], answer: Any, has_template: bool) -> Turns:
    """Both lists as one conversation, in which nothing of the prompt trains."""
    answer = [answer] if isinstance(answer, Mapping) else answer
    if not isinstance(answer, list) or not answer:
        raise BadRowError("column 'prompt' is a list of messages, and 'completion' is none")
    if not has_template:
        raise BadRowError(
            "columns 'prompt' and 'completion' are lists of messages, which need a chat template; "
            "set dataset.chat_template, and no dataset.chat: false"
        )
    turns: Turns = plugins.load("formats", "chat").to_example({"messages": [*prompt, *answer]}, has_template=True)
    return replace(turns, untrained=turns.untrained | frozenset(range(len(prompt))))
