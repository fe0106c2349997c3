"""Trained rows of tables and nothing else: PEFT's TRAINABLE_TOKENS. It has no layer; see adapters/token_rows.py."""

from __future__ import annotations

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.adapters.kind import COPY_AGAIN, Parts
from dynlora_cli.errors import UsageError

title = "trained rows"
read_as = "trained rows of tokens"
tensors = ()


def read(adapter: Adapter, parts: Parts, _base: str | None) -> dict[str, Factors]:
    """No layers.

    Raises:
        UsageError: there are factors of some, which the kind does not have.
    """
    if parts:
        name = next(iter(parts))
        raise UsageError(f"{adapter.folder / WEIGHTS} holds factors of {name}, and is of TRAINABLE_TOKENS", COPY_AGAIN)
    return {}
