"""An example as a person reads it: what the model sees, and what of it counts in the loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynlora_cli.data.encode import decode
from dynlora_cli.data.examples import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None
) -> list[tuple[str, bool]]:
    """The text of an example in pieces, each with whether it is in the loss; joined, they are the decoded whole.

    Args:
        example: of a causal language model, of an encoder and decoder, or of a classifier: its text, and the class.
        tokenizer: that made it.
        labels: names of the classes.
    """
    ids = list(example.input_ids)
    if isinstance(example.labels, int):
        name = labels[example.labels] if labels else str(example.labels)
        return [(decode(tokenizer, ids), False), ("  class: ", False), (name, True)]
    if example.decoded:
        return [(decode(tokenizer, ids), False), (decode(tokenizer, example.labels), True)]
    flags = [label != IGNORED for label in example.labels]
    pieces, shown, end = [], "", 0
    for flag, run in itertools.groupby(flags):
        end += len(list(run))
        text = decode(tokenizer, ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # a character whose bytes go on in the next piece is shown there
        pieces.append((text[len(shown) :], flag))
        shown = text
    return pieces
