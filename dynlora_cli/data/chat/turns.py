"""Whether rows of prompt and answer become turns of user and assistant: `dataset.chat`.

A model with a chat template is asked through it as soon as it is served, so that is the form to learn from. Rows that
somebody has put into such a form already stay as they are: a template around a template is neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dynlora_cli.data.chat.template import MARKER, write
from dynlora_cli.data.forms import BadRowError
from dynlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The columns of formats that can be either; the conversation of `chat` has turns anyway, and `text` has none.
PAIRS = {
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "grounded": ("prompt", "completion"),
    "preference": ("prompt", "chosen"),
    "kto": ("prompt", "completion"),
}
_ASKING = {"preference": ("prompt", "question", "instruction"), "kto": ("prompt",)}  # of those, what may be bare text
# What well-known templates put around a turn, whichever of them the model has.
_MARKS = re.compile(
    r"<\|im_(?:start|end|sep)\|>|<\|start_header_id\|>|<\|e(?:ot|om)_id\|>|\[/?INST\]|<(?:start|end)_of_(?:turn|role)>"
    r"|<\|(?i:user|assistant|system|end|turn|start|endoftext|end_of_text)\|>|<\uff5c\w+\uff5c>|<\|turn>|</s>"
)
# A prompt that ends where somebody's turn is opened.
_OPENED = re.compile(r"(?:^|\n)[#\s]*(?:assistant|response|gpt|bot):\s*$", re.IGNORECASE)
_LEAST = 3  # characters of a mark of the model's own template


def as_turns(
    tokenizer: PreTrainedTokenizerBase,
    chat: bool | Literal["auto"],
    form: str,
    rows: Sequence[Mapping[str, Any]],
    recorded: Mapping[str, bool],
) -> tuple[bool, str]:
    """Whether rows become turns, and a note for the person; empty where there is nothing to say.

    Args:
        tokenizer: with or without a chat template.
        chat: the recipe's `dataset.chat`.
        form: the format of the rows, by name.
        rows: the first ones, columns already renamed.
        recorded: what the run that the rows belong to did, by format.

    Raises:
        DataError: turns are asked for, and there is no template.
    """
    has_template = bool(tokenizer.chat_template)
    if form in _ASKING and rows and not any(isinstance(rows[0].get(name), str) for name in _ASKING[form]):
        # Messages, or texts whose prompt is in the answers.
        talks = any(isinstance(value, (list, Mapping)) for value in rows[0].values())
        return has_template and talks and chat is not False, ""
    if form not in PAIRS:
        asked, is_chat = chat != "auto", form == "chat"
        other = asked and chat is not is_chat
        kind = "conversations are turns in any case" if is_chat else f"rows of the format {form} have no turns"
        return has_template, f"dataset.chat is not used: {kind}" if other else ""
    if not has_template:
        if chat is True:
            raise DataError(
                "dataset.chat: true needs a chat template, and the model's tokenizer has none",
                "set dataset.chat_template, or leave dataset.chat out, and the rows are trained as bare text",
            )
        return False, ""
    if chat != "auto":
        return chat, ""
    if form in recorded:
        bare = "" if recorded[form] else f"{form} rows stay bare text, as in the run that they belong to"
        return recorded[form], bare
    mark, count = _marked(tokenizer, form, rows)
    if count * 2 > len(rows):
        return False, (
            f"{form} rows stay as they are, for they have {mark!r} in them, as a chat template writes it "
            "(dataset.chat: auto; true makes turns of them all the same)"
        )
    note = f"{form} rows become turns of user and assistant, for the model has a chat template "
    note += "(dataset.chat: auto; false trains them as bare text)"
    return True, note + (f"; {count} of the first {len(rows)} have a template's marks in them already" if count else "")


def _marked(tokenizer: PreTrainedTokenizerBase, form: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """A mark of a chat template that rows have in them, and how many do."""
    own = _own_marks(tokenizer)
    first, count = "", 0
    for row in rows:
        prompt, answer = (str(row.get(column) or "") for column in PAIRS[form])
        found = _MARKS.search(prompt) or _OPENED.search(prompt) or _MARKS.search(answer)
        mark = found.group().strip() if found else next((text for text in own if text in prompt), "")
        count += bool(mark)
        first = first or mark
    return first, count


def _own_marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model's own template puts before a question and behind it."""
    try:
        text = write(tokenizer, [{"role": "user", "content": MARKER}], None, answer=True)
    except BadRowError:  # it will say why when the rows are written
        return []
    before, _, behind = text.partition(MARKER)
    marks = [*before.split("\n")[-2:], *behind.split("\n")]
    return [mark.strip() for mark in marks if len(mark.strip()) >= _LEAST]
