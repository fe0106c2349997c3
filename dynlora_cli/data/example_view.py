"""An example as a person reads it: what the model sees, and what of it counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dynlora_cli.data.encode import decode
from dynlora_cli.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str] | None = None
) -> list[tuple[str, bool]]:
    """The text of an example in pieces, each with whether it is in the loss; see `Example.shown`.

    Args:
        example: of any task.
        tokenizer: that made it.
        classes: their names, where the task has any.
    """
    return example.shown(partial(decode, tokenizer), classes)
