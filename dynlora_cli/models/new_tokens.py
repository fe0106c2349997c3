"""Tokens that a tokenizer gets beside its own, and first values of their rows in a model's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AddedToken

from dynlora_cli.errors import UsageError
from dynlora_cli.text import show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.adapter_section import NewToken


@dataclass(frozen=True)
class Token:
    """A token whose rows train.

    Attributes:
        text: the token.
        number: its id, and its row in a table.
        special: answers are shown without it.
        known: the tokenizer had it before.
        pieces: ids of the tokens that its text was before; (): it was none, or is known.
    """

    text: str
    number: int
    special: bool = False
    known: bool = False
    pieces: tuple[int, ...] = ()


def add_tokens(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[NewToken]) -> list[Token]:
    """Give a tokenizer new tokens; it is changed in place.

    They are found in raw text, before it is normalized, wherever they stand; their ids go on where its own end. One
    that it has already stays as it is there.

    Raises:
        UsageError: the tokenizer does not find one of them in its own text.
    """
    had = tokenizer.get_vocab()
    pieces = {new.content: tuple(_ids(tokenizer, new.content)) for new in wanted if new.content not in had}
    for new in wanted:
        if new.content in pieces:
            token = AddedToken(new.content, special=new.special, normalized=False)
            tokenizer.add_tokens([token], special_tokens=new.special)
    special = set(tokenizer.all_special_ids) | _special_of(tokenizer)
    found = []
    for new in wanted:
        number = tokenizer.get_vocab().get(new.content)
        if number is None or _ids(tokenizer, new.content) != [number]:
            raise UsageError(
                f"adapter.new_tokens: the tokenizer does not take {show(new.content)} as one token",
                "choose a text that its own tokens do not cut up, such as <|name|>",
            )
        known = new.content in had
        found.append(Token(new.content, number, number in special, known, pieces.get(new.content, ())))
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def first_rows(weight_VI: Tensor, tokens: Iterable[Token], *, how: str, known: int) -> Tensor:
    """First values of the rows of tokens in a table, [T, I], fp32.

    Args:
        weight_VI: the table's own rows.
        tokens: those that the tokenizer had before keep the row that they have in it.
        how: `adapter.new_tokens_init`.
        known: rows that the tokenizer had tokens for; those behind them may be padding.
    """
    mean_I = weight_VI[:known].mean(0, dtype=torch.float32)
    rows = []
    for token in tokens:
        pieces = [token.number] if token.known else list(token.pieces) if how == "text" else []
        pieces = [piece for piece in pieces if piece < len(weight_VI)]
        rows.append(weight_VI[pieces].float().mean(0) if pieces else mean_I)
    return torch.stack(rows)


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose rows train in a run.

    Attributes:
        tokens: in the order of their rows; those that an adapter of the run brings come first.
        known: so many tokens the tokenizer had before.
        old_rows: rows of the first tokens, fp32, by the name of the table; (): no adapter brings any.
        old: how many tokens those are.
    """

    tokens: tuple[Token, ...]
    known: int
    old_rows: Mapping[str, Tensor] = field(default_factory=dict)
    old: int = 0

    @property
    def size(self) -> int:
        """Rows that a table must have for them."""
        return max(token.number for token in self.tokens) + 1
