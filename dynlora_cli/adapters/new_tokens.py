"""`adapter.new_tokens`: the tokenizer gets them before rows are read, and the model their rows before it trains.

An adapter that a run goes on from may bring some, too. They come first, with the rows that they have there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.adapters.find import config_in, find_origin, merge_first
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.token_rows import LIST
from dynlora_cli.config.adapter_section import NewToken
from dynlora_cli.errors import UsageError
from dynlora_cli.models.new_tokens import NewTokens, Token, add_tokens, first_rows
from dynlora_cli.models.place import input_table, tied
from dynlora_cli.models.token_rows import TokenHead, TokenRows, put_rows
from dynlora_cli.models.tokenizer import load_tokenizer
from dynlora_cli.runs import record as records
from dynlora_cli.text import counted, show

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter as Origin
    from dynlora_cli.config.adapter_section import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.load import Data
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.models.load import Base

LISTED = 8  # so many tokens are named in a message


def add_new_tokens(recipe: Recipe, files: BaseFiles, before: Mapping[str, Any] | None = None) -> None:
    """Give the base's tokenizer the tokens of a run, and its files word of their rows.

    Args:
        recipe: of the run.
        files: of its base.
        before: the record of a run that is resumed. Where it knows no tokens, `adapter.from` is not looked at again:
            what came from there is in the checkpoint.

    Raises:
        UsageError: the tokenizer does not take one of them, or an adapter's tokens are none of this base.
    """
    if before is not None and "tokens" not in before:
        return
    origin = _origin(recipe, files)
    if not recipe.adapter.new_tokens and origin is None:
        return
    if files.own_rows is None:
        raise UsageError(f"adapter.new_tokens: {files.folder / 'config.json'} does not say how many tokens it knows")
    known, old, old_rows = len(files.tokenizer), [], {}
    if origin is not None:
        old = _old_tokens(origin, files)
        old_rows = {table: rows.rows_TI for table, rows in origin.token_rows.items()}
    named = {token.text for token in old}
    wanted = [new for new in recipe.adapter.new_tokens if new.content not in named]
    tokens = [*old, *add_tokens(files.tokenizer, wanted)]
    numbers = {token.number for token in tokens}
    for number in range(files.own_rows, max(numbers) + 1):  # of a tokenizer that knows more than the table has rows for
        if number not in numbers:
            text = str(files.tokenizer.convert_ids_to_tokens(number))
            tokens.append(Token(text, number, known=True))
    files.new = NewTokens(tuple(tokens), known, old_rows, len(old))
    files.rows = files.new.size


def _origin(recipe: Recipe, files: BaseFiles) -> Origin | None:
    """The adapter that the run goes on from, where it brings rows of tokens."""
    if recipe.adapter.origin is None:
        return None
    folder = find_origin(Path(recipe.adapter.origin), Path(recipe.output_dir))
    if not config_in(folder).get(LIST):
        return None
    adapter = read_adapter(folder, str(files.folder))
    if len({rows.indices for rows in adapter.token_rows.values()}) > 1:
        text = f"adapter.from: {folder} has rows of other tokens in one table than in the other"
        raise UsageError(text, merge_first(folder))
    return adapter


def _old_tokens(origin: Origin, files: BaseFiles) -> list[Token]:
    """The tokens of an adapter, of which the base's tokenizer gets those that it lacks.

    Raises:
        UsageError: nobody knows one of them, or it gets another number here.
    """
    indices = next(iter(origin.token_rows.values())).indices
    lacking = sorted(number for number in indices if number >= len(files.tokenizer))
    if lacking:
        if not (origin.folder / "tokenizer_config.json").is_file():
            raise UsageError(
                f"adapter.from: {origin.folder} has a row for token {lacking[0]}, which the base's tokenizer does not "
                "know, and no tokenizer stands beside it",
                "copy the tokenizer's files that it was trained with into its folder",
            )
        theirs = load_tokenizer(origin.folder)
        for number in range(len(files.tokenizer), lacking[-1] + 1):
            token = theirs.added_tokens_decoder.get(number)
            wanted = [] if token is None else [NewToken(content=token.content, special=token.special)]
            if not wanted or add_tokens(files.tokenizer, wanted)[0].number != number:
                raise UsageError(
                    f"adapter.from: token {number} of {origin.folder} gets no such number in the tokenizer of "
                    f"{files.folder}",
                    "name the base that the adapter was trained on in model.name_or_path",
                )
    special = {number for number, token in files.tokenizer.added_tokens_decoder.items() if token.special}
    texts = files.tokenizer.convert_ids_to_tokens(list(indices))
    return [
        Token(str(text), number, number in special, known=True) for text, number in zip(texts, indices, strict=True)
    ]


def put_new_tokens(base: Base, options: Adapter) -> list[str]:
    """Put the rows of `base.files.new` on a model, at their first values.

    Args:
        base: changed in place; on the device "meta" the rows have no values.
        options: the recipe's `adapter` section.

    Returns:
        Notes on what trains.

    Raises:
        UsageError: the model has no table, or one that cannot have such rows.
    """
    new, model = base.files.new, base.model
    if new is None:
        return []
    inner, outer = input_table(model), model.get_output_embeddings()
    if inner is None:
        raise UsageError(f"adapter.new_tokens: {base.folder} has no table of tokens", "leave them out")
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    tables = [names[id(inner)]]
    if outer is not None and tied(model) is None:
        tables.append(names[id(outer)])
    for table in tables:
        rows_TI = _values(model.get_parameter(f"{table}.weight").detach(), table, new, options)
        held = new.old if options.old != "tune" else 0
        base.rows[table] = TokenRows([token.number for token in new.tokens], rows_TI, held=held, trains=True)
        put_rows(model, table, base.rows[table])
    if outer is not None and not isinstance(model.get_output_embeddings(), TokenHead):
        raise UsageError(
            f"adapter.new_tokens: the output head of {base.folder} shares the table's weight in a way that is not "
            "known here, so it would not learn them",
            "add the tokens to the base's table beforehand, or leave them out",
        )
    return _notes(base, new, tied(model))


@torch.no_grad()
def _values(weight_VI: Tensor, table: str, new: NewTokens, options: Adapter) -> Tensor:
    """First rows of all tokens in a table."""
    rows_TI = first_rows(weight_VI, new.tokens, how=options.new_tokens_init, known=new.known)
    if table in new.old_rows and not rows_TI.is_meta:
        rows_TI[: new.old] = new.old_rows[table].to(rows_TI)
    return rows_TI


def _notes(base: Base, new: NewTokens, shared: tuple[str, str] | None) -> list[str]:
    """What of them a person would want to know."""
    listed = ", ".join(f"{show(token.text)} ({token.number})" for token in new.tokens[:LISTED])
    more = f" and {len(new.tokens) - LISTED} more" if len(new.tokens) > LISTED else ""
    tables = " and ".join(base.rows) + (f", whose rows {shared[1]} shares," if shared else "")
    numbers = sum(rows.own_TI.numel() for rows in base.rows.values())
    notes = [
        f"new tokens: {listed}{more}: their rows of {tables} train, {counted(numbers, 'number')} beside the budget"
    ]
    if new.old:
        does = "train on" if next(iter(base.rows.values())).held_HI.numel() == 0 else "stay as they are"
        notes.append(f"new tokens: {counted(new.old, 'row')} of adapter.from {does}")
    if (table := base.files.own_rows) is not None and new.size > table:
        notes.append(
            f"new tokens: the base's table has {table} rows, and {new.size} are needed: whoever loads the adapter with "
            f"other tools enlarges it first, model.resize_token_embeddings({new.size}); `dynlora merge` writes it so"
        )
    notes += [
        f"adapter.new_tokens: {show(token.text)} is token {token.number} of the tokenizer already; its row trains from "
        "where it is"
        for token in new.tokens[new.old :]
        if token.known and token.number < (table or 0)
    ]
    return notes


def untaught(new: NewTokens, data: Data) -> list[str]:
    """A note on tokens that no row has."""
    seen: set[int] = set()
    for example in (*data.train, *data.replayed):
        for text in example.texts:
            seen.update(text)
    lacking = [show(token.text) for token in new.tokens[new.old :] if token.number not in seen]
    if not lacking:
        return []
    what = "stands" if len(lacking) == 1 else "stand"
    if data.stream:
        return [f"adapter.new_tokens: {', '.join(lacking)} {what} in none of the rows that are read at first"]
    return [
        f"adapter.new_tokens: {', '.join(lacking)} {what} in none of the rows that are trained on, so nothing teaches "
        "what it means" + (": look at its spelling, and at dataset.chat_template" if len(lacking) == 1 else "")
    ]


def tokens_on_record(base: Base) -> records.Tokens:
    """What dynlora.json says of them."""
    new = base.files.new
    assert new is not None
    return records.Tokens(
        table_rows=max(new.size, base.files.own_rows or 0),
        base_rows=base.files.own_rows,
        new=[records.NewToken(text=t.text, number=t.number, special=t.special, known=t.known) for t in new.tokens],
    )
