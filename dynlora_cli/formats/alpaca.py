"""Instruction, input and output.

What it does
    Becomes a conversation (user: instruction and input, assistant: output) where the tokenizer has a chat template,
    so that training and serving use the same text; otherwise the classic Alpaca prompt. The loss is on the output.

When to use it
    For Alpaca, Dolly and the many data sets made in their form.

Columns
    `instruction`, `output`; optional `input` and `system`.

Reference
    Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.formats._forms import Pair, Turns, optional_text, text_of

COLUMNS = "instruction, output [input, system]"
TASKS = ("causal-lm", "seq2seq-lm")
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
        has_template: whether the tokenizer has a chat template.

    Raises:
        BadRowError: instruction or output is missing or no text.
    """
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    context, system = optional_text(row, "input"), optional_text(row, "system")
    if has_template:
        opening = [{"role": "system", "content": system}] if system else []
        question = f"{instruction}\n\n{context}" if context else instruction
        return Turns([*opening, {"role": "user", "content": question}, {"role": "assistant", "content": output}])
    preamble = system or (_TASK + _CONTEXT + _REQUEST if context else _TASK + _REQUEST)
    given = f"### Input:\n{context}\n\n" if context else ""
    return Pair(f"{preamble}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n", output)
