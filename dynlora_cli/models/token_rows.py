"""Rows of single tokens in a model's tables, in place of the table's own; the table itself stays as it is.

    TokenRows    the rows, and whose they are
    TokenTable   an input table with them
    TokenHead    an output head with them
    put_rows     both put on a model

A token that the table has no row for gets one here: ids go on where the table ends, and the head answers with as many
logits more. So a table is neither copied nor made larger in memory, and no gradient of it is ever as large as it is.

Source: PEFT's `trainable_token_indices`, which replaces rows in a copy of the table at every pass.

Dimensions: T tokens, V rows of the table, N rows with those behind its end, I inputs, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError

Change = tuple[nn.Module, str, nn.Module]  # the holder, the attribute, and the module that was there before


class TokenRows(nn.Module):
    """Rows of some tokens.

    Args:
        tokens: whose rows they are; no number twice.
        rows_TI: their values, fp32.
        held: the first so many do not train, whatever the others do.
        trains: whether the others do.
    """

    tokens_T: Tensor
    held_HI: Tensor

    def __init__(self, tokens: Sequence[int], rows_TI: Tensor, *, held: int = 0, trains: bool = False) -> None:
        super().__init__()
        if len(set(tokens)) != len(tokens) or len(tokens) != len(rows_TI) or min(tokens, default=0) < 0:
            raise ValueError(f"{len(rows_TI)} rows for the tokens {list(tokens)}")
        self.tokens = tuple(tokens)
        self.register_buffer("tokens_T", torch.tensor(self.tokens, device=rows_TI.device), persistent=False)
        self.register_buffer("held_HI", rows_TI[:held].detach().float().clone())
        self.own_TI = nn.Parameter(rows_TI[held:].detach().float().clone(), requires_grad=trains)

    def forward(self) -> Tensor:
        """All rows [T, I], in the order of `tokens`."""
        return torch.cat([self.held_HI, self.own_TI]) if len(self.held_HI) else self.own_TI


class _WithRows(nn.Module):
    """A module that holds a table [V, I], with rows of single tokens; what it does not have itself is the module's.

    Args:
        base: the module.
        rows: to be put in the place of its own.
        shared: the rows belong to another module, and are no part of this one.
    """

    place_N: Tensor

    rows: TokenRows

    def __init__(self, base: nn.Module, rows: TokenRows, *, shared: bool = False) -> None:
        super().__init__()
        self.base = base
        if shared:
            vars(self)["rows"] = rows  # past nn.Module.__setattr__: a module moves its parameters once
        else:
            self.rows = rows
        weight: Any = base._parameters.get("weight")  # not `base.weight`, which a streamed module reads from disk
        self.table = int(weight.shape[0])
        size = max(self.table, *(token + 1 for token in rows.tokens))
        if missing := [token for token in range(self.table, size) if token not in rows.tokens]:
            raise UsageError(
                f"there is a row for token {size - 1}, and none for {missing[0]}: the table has {self.table} rows",
                "enlarge the base's table (resize_token_embeddings), and save the base and the adapter again",
            )
        place_N = torch.full((size,), -1)
        place_N[list(rows.tokens)] = torch.arange(len(rows.tokens))
        self.register_buffer("place_N", place_N.to(rows.tokens_T.device), persistent=False)
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class TokenTable(_WithRows):
    """An input table of tokens: rows of single tokens in place of its own, and behind its end."""

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., I]."""
        place = self.place_N[ids]
        y = self.base(ids.clamp(max=self.table - 1))
        scale = getattr(self.base, "embed_scale", 1.0)  # Gemma's tables and others multiply their rows
        own = F.embedding(place.clamp(min=0), self.rows()) * scale
        return torch.where((place >= 0)[..., None], own.to(y.dtype), y)


class TokenHead(_WithRows):
    """An output head without a bias: logits of single tokens from rows of their own."""

    def __init__(self, base: nn.Module, rows: TokenRows, *, shared: bool = False) -> None:
        super().__init__(base, rows, shared=shared)
        self.inside_t: Tensor
        self.from_t: Tensor
        self.behind_t: Tensor
        if getattr(base, "bias", None) is not None:
            raise UsageError(
                "the model's output head has a bias, which PEFT leaves out where single tokens have their own rows",
                "merge the adapter with the tool that made it, or train without rows of single tokens",
            )
        tokens, device = rows.tokens, rows.tokens_T.device
        inside = [place for place, token in enumerate(tokens) if token < self.table]
        behind = sorted(set(range(len(tokens))) - set(inside), key=lambda place: tokens[place])
        self.inside = bool(inside)
        for name, numbers in (
            ("inside_t", [tokens[place] for place in inside]),  # columns of the table's logits, and whose they become
            ("from_t", inside),
            ("behind_t", behind),
        ):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.long, device=device), persistent=False)

    @property
    def out_features(self) -> int:
        """Logits that it answers with (N)."""
        return len(self.place_N)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., N]."""
        return self.placed(self.base(x), F.linear(x, self.rows().to(x.dtype)))

    def placed(self, logits: Tensor, own: Tensor) -> Tensor:
        """The logits of the table [..., V] with those of the rows [..., T] in their places: [..., N]."""
        own = own.to(logits.dtype)
        if self.inside:
            logits = logits.index_copy(-1, self.inside_t, own.index_select(-1, self.from_t))
        return torch.cat([logits, own.index_select(-1, self.behind_t)], -1) if len(self.behind_t) else logits

    def parted(self, grad_nN: Tensor) -> tuple[Tensor, Tensor]:
        """The backward pass of `placed`: a gradient [n, N] as that of the table [n, V] and of the rows [n, T]."""
        grad_nT = grad_nN.index_select(-1, self.rows.tokens_T)
        grad_nV = grad_nN[:, : self.table]
        return (grad_nV.index_fill(-1, self.inside_t, 0) if self.inside else grad_nV), grad_nT


def tied_to(model: PreTrainedModel, table: str) -> list[str]:
    """The names of the modules that have the weight of a table as their own, such as an output head."""
    shared = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name.removesuffix(".weight") for name, source in shared.items() if source == f"{table}.weight"]
    return [name for name in names if name != table]


def put_rows(model: PreTrainedModel, table: str, rows: TokenRows) -> list[Change]:
    """Put rows of single tokens on a table of a model, and on every module that shares its weight.

    Args:
        model: changed in place.
        table: the name of the input table, or of an output head that has a weight of its own.
        rows: on the model's device.

    Returns:
        what was changed, for `take_off`.

    Raises:
        UsageError: the model has no table of that name, or one that cannot have such rows.
    """
    changes: list[Change] = []
    for name in [table, *tied_to(model, table)]:
        parent, _, leaf = name.rpartition(".")
        try:
            holder, module = model.get_submodule(parent), model.get_submodule(name)
        except AttributeError:
            raise UsageError(f"the base model has no table {name}", "is it another model?") from None
        if isinstance(module, _WithRows):  # held at two places
            continue
        if not isinstance(module, nn.Embedding) and type(module) is not nn.Linear:
            take_off(changes)
            raise UsageError(f"{name} is a {type(module).__name__}, in which single tokens cannot have rows")
        try:
            kind = TokenTable if isinstance(module, nn.Embedding) else TokenHead
            by = kind(module, rows, shared=bool(changes))
        except UsageError:
            take_off(changes)
            raise
        changes.append((holder, leaf, module))
        setattr(holder, leaf, by)
    return changes


def take_off(changes: list[Change]) -> None:
    """The model as it was before `put_rows`."""
    for holder, leaf, module in reversed(changes):
        setattr(holder, leaf, module)


def without_rows(module: nn.Module) -> nn.Module:
    """A table or head as it is without rows of single tokens; any other module as it is."""
    return module.base if isinstance(module, _WithRows) else module
