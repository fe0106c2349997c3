"""Instruction, input and output.

What it does
    Becomes a conversation (user: instruction and input, assistant: output) where the model has a chat template
    (`dataset.chat`), so that training and serving use the same text; otherwise the classic Alpaca prompt. The loss is
    on the output, and on the answers in `history`, which come before the question.

When to use it
    For Alpaca, Dolly and the many data sets made in their form.

Columns
    `instruction`, `output`; optional `input`, `system`, and `history`: a list of [question, answer] or its JSON, as
    LLaMA-Factory has it.

Reference
    Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.forms import BadRowError, Pair, Turns, optional_text, text_of
from dynlora_cli.files.strict_json import BadJsonError, loads

COLUMNS = "instruction, output [input, system, history]"
FORMS = ("Turns", "Pair")
PRECEDENCE = 1

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as instructions."""
    return {"instruction", "output"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Turns | Pair:
    """The conversation, or the classic prompt and its answer.

    Args:
        row: the row, columns already renamed.
        has_template: whether the row becomes a conversation.

    Raises:
        BadRowError: instruction or output is missing or no text, or there is a history and no template.
    """
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    context, system = optional_text(row, "input"), optional_text(row, "system")
    history = _history(row.get("history"))
    if has_template:
        opening = [{"role": "system", "content": system}] if system else []
        question = f"{instruction}\n\n{context}" if context else instruction
        pairs = [*history, (question, output)]
        texts = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
        return Turns([*opening, *({"role": role, "content": text} for role, text in texts)])
    if history:
        raise BadRowError(
            "column 'history' holds earlier turns, which need a chat template; "
            "set dataset.chat_template, and no dataset.chat: false"
        )
    preamble = system or (_TASK + _CONTEXT + _REQUEST if context else _TASK + _REQUEST)
    given = f"### Input:\n{context}\n\n" if context else ""
    return Pair(f"{preamble}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n", output)


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier questions with their answers, oldest first."""
    try:
        pairs = loads(value or "null") if isinstance(value, str) else value
    except BadJsonError as error:
        raise BadRowError(f"column 'history' is text and {error.reason}") from None
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise BadRowError(f"column 'history' is {pairs!r:.60}, expected a list of [question, answer]")
    return [(question, answer) for question, answer in pairs]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
