"""Whether each token of the rows has a row in the model's table of tokens.

A tokenizer that got tokens of its own knows more than a table that was not enlarged with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "use the tokenizer that belongs to the model, or enlarge its table (resize_token_embeddings) and save it again"


class Vocabulary:
    """What one tokenizer may say to one model.

    Args:
        tokenizer: that makes the tokens.
        table: rows of the model's table; None: nobody knows. An attribute as well.

    Raises:
        DataError: padding has no row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: int | None) -> None:
        self._tokenizer = tokenizer
        self._table = table if table is not None and max(tokenizer.get_vocab().values(), default=0) >= table else None
        self.table = table
        pad = tokenizer.pad_token_id
        if self._table is not None and isinstance(pad, int) and pad >= self._table:
            hint = f"name another pad_token in tokenizer_config.json, such as {tokenizer.eos_token!r}"
            raise DataError(f"the tokenizer pads with {self._beyond(pad)}", f"{hint}, or enlarge the table")

    def check(self, place: str, *texts: Sequence[int]) -> None:
        """Look at the tokens of a row.

        Raises:
            DataError: one of them has no row.
        """
        if self._table is None:
            return
        largest = max((max(ids, default=0) for ids in texts), default=0)
        if largest >= self._table:
            raise DataError(f"{place}: the text has {self._beyond(largest)}", _HINT)

    def _beyond(self, token: int) -> str:
        known = max(self._tokenizer.get_vocab().values()) + 1
        name = self._tokenizer.convert_ids_to_tokens(token)
        where = f"number {token} of the tokenizer's {known}"
        return f"the token {name!r}, {where}, and the model's table has {self._table} rows"


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Over all that a tokenizer does; only over the vocabulary of one that is Python code, such as ByT5's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return sha256_of_text(known)


def sha256_of_text(text: str) -> str:
    """Over its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
