"""An answer to a prompt, and whether it is good.

What it does
    For `train.objective: kto`, which needs no pairs: thumbs up and thumbs down are enough. Prompts and answers that are
    bare text become turns where the model has a chat template (`dataset.chat`).

When to use it
    For feedback on single answers. Rows with `chosen` and `rejected` are of the format preference, which
    serves kto too.

Columns
    `prompt`, `completion`: two texts or two lists of messages; or `messages`, or `conversations`, of which the last is
    the answer. `label`, or `kto_tag`: true for a good answer, false for a bad one (or 1 and 0). Optional `system`, and
    `tools` or `functions` for conversations.

Reference
    TRL's unpaired preference format, https://huggingface.co/docs/trl/dataset_formats; Ethayarajh et al., KTO: Model
    Alignment as Prospect Theoretic Optimization, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.data.columns import mark_of
from dynlora_cli.data.forms import BadRowError, Judged, Turns, optional_text, text_of

COLUMNS = "prompt, completion, label | messages, label [conversations, kto_tag, system, tools, functions]"
FORMS = ("Judged",)
PRECEDENCE = 1


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as judged answers."""
    talks = {"prompt", "completion"} <= columns or bool({"messages", "conversations"} & columns)
    return talks and bool({"label", "kto_tag"} & columns)


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Judged:
    """The prompt of a row, its answer, and whether that is good.

    Args:
        row: the row, columns already renamed.
        has_template: whether prompts and answers that are bare text become turns; lists of messages need it.

    Raises:
        BadRowError: one of them is missing or is none, or there is no template for messages.
    """
    label = _label(row)
    prompt, answer, system = row.get("prompt"), row.get("completion"), optional_text(row, "system")
    if not isinstance(prompt, list) and "completion" in row and not isinstance(answer, (list, Mapping)):
        asked, said = text_of(row, "prompt"), "" if answer == "" else text_of(row, "completion")
        if not has_template:
            if system:
                raise BadRowError(
                    "a 'system' needs a chat template; set dataset.chat_template, and no dataset.chat: false"
                )
            return Judged(asked, said, label)
        opening = [{"role": "system", "content": system}] if system else []
        return Judged([*opening, {"role": "user", "content": asked}], [{"role": "assistant", "content": said}], label)
    if not has_template:
        raise BadRowError(
            "the row holds messages, which need a chat template; set dataset.chat_template, and no dataset.chat: false"
        )
    messages, said_last = _messages(row, prompt, answer)
    read = {key: row[key] for key in ("system", "tools", "functions") if key in row}
    turns: Turns = plugins.load("formats", "chat").to_example({**messages, **read}, has_template=True)
    end = len(turns.messages) - said_last
    if end < 1:
        raise BadRowError("there is no message before the answer")
    return Judged(turns.messages[:end], turns.messages[end:], label, turns.tools, turns.remarks)


def _messages(row: Mapping[str, Any], prompt: Any, answer: Any) -> tuple[dict[str, Any], int]:
    """The columns of the whole conversation as `chat` reads them, and how many of its last messages are the answer."""
    if "completion" not in row:
        return {key: row[key] for key in ("messages", "conversations") if key in row}, 1
    answer = [answer] if isinstance(answer, Mapping) else answer
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(said, list) or not said or not isinstance(asked, list):
        raise BadRowError("'prompt' and 'completion' must be texts or lists of messages")
    return {"messages": [*asked, *said]}, len(said)


def _label(row: Mapping[str, Any]) -> bool:
    name = "label" if row.get("label") is not None else "kto_tag"
    mark = mark_of(row.get(name))
    if mark not in (0, 1):
        shown = "missing or null" if row.get(name) is None else repr(row[name])[:40]
        raise BadRowError(f"column {name!r} is {shown}, and an answer is good (true) or bad (false)")
    return bool(mark)
