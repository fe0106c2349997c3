"""What several adapters have beside their components, as one: rows of tables, biases, heads.

They take the place of the base's own numbers, so the weighted sum of their updates is, for each row and each bias,

    base + Σ w (own - base)          over the adapters that have it

The base is not here. It is not needed where the weights of those adapters sum to 1; then it is Σ w own. What is the
same in all adapters that have it stays as it is, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors, TokenRows
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object

Held = Sequence[tuple[float, Tensor]]  # weights of the adapters that have it, and what they have
CLOSE = 1e-6
INTO_BASE = "merge one into its base first: dynlora merge --adapter FOLDER --into base"


def put_together(adapters: Sequence[Adapter], weights: Sequence[float], method: str, adds: bool) -> Adapter:
    """The first adapter with the biases and rows of all.

    Args:
        adapters: of one base, with the same heads.
        weights: one for each.
        method: of --method, for messages.
        adds: the method adds updates up, and does nothing else with them.

    Raises:
        UsageError: they cannot be put together without the base, or by this method.
    """
    whole = {name: tensor for name, tensor in adapters[0].whole.items() if name not in adapters[0].biases}
    for name in sorted({name for adapter in adapters for name in adapter.biases}):
        held = [(w, a.whole[name]) for w, a in zip(weights, adapters, strict=True) if name in a.whole]
        whole[name] = _sum(held, name, method, adds)
    return replace(adapters[0], whole=whole, token_rows=_rows(adapters, weights, method, adds))


def bias_of(parts: Sequence[tuple[float, Factors]], name: str, method: str, adds: bool) -> Tensor | None:
    """What a layer of the result adds to its output: the weighted sum of what those of the adapters add.

    Raises:
        UsageError: the method does not add up.
    """
    held = [(weight, factors.bias_O) for weight, factors in parts if factors.bias_O is not None]
    if not held:
        return None
    if not adds:
        raise UsageError(f"{name} adds a bias, and --method {method} is for the entries of weights", _adding())
    return sum((weight * bias_O for weight, bias_O in held), start=torch.zeros(len(held[0][1])))


def refuse_pair(first: Adapter, other: Adapter) -> None:
    """Refuse two adapters whose heads differ, whose tables have other names, or whose tokens are others."""
    heads = [{name: t for name, t in each.whole.items() if name not in each.biases} for each in (first, other)]
    if not _equal(*heads):
        raise UsageError(
            f"{first.folder} and {other.folder} have heads or embeddings of their own, which cannot be added",
            "combine adapters without them, or merge one into its base",
        )
    if not (first.token_rows and other.token_rows):
        return
    if first.token_rows.keys() != other.token_rows.keys():
        shown = " and ".join(", ".join(each.token_rows) for each in (first, other))
        raise UsageError(f"{first.folder} and {other.folder} have trained rows of different tables: {shown}", INTO_BASE)


def refuse_other_tokens(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters with trained rows whose tokenizers call a token by different names, or lack one of another's.

    Raises:
        UsageError: they do.
    """
    if not any(adapter.token_rows for adapter in adapters):
        return
    known: list[tuple[Path, dict[int, str]]] = [(adapter.folder, _added(adapter.folder)) for adapter in adapters]
    first, names = known[0]
    for folder, others in known[1:]:
        if not (names and others):
            continue
        for token, name in others.items():
            if names.get(token) == name:
                continue
            if token in names:
                raise UsageError(f"token {token} is {names[token]!r} in {first} and {name!r} in {folder}", INTO_BASE)
            raise UsageError(
                f"the tokenizer of {first}, which the result gets, lacks the token {name!r} of {folder}",
                f"name {folder} first",
            )


def _added(folder: Path) -> dict[int, str]:
    """The tokens that were added to a tokenizer, by number; {} where there is no tokenizer that says."""
    path = folder / "tokenizer.json"
    entries: Any = read_object(path).get("added_tokens") if path.is_file() else None
    found = entries if isinstance(entries, list) else []
    return {e["id"]: str(e.get("content")) for e in found if isinstance(e, Mapping) and isinstance(e.get("id"), int)}


def _rows(adapters: Sequence[Adapter], weights: Sequence[float], method: str, adds: bool) -> dict[str, TokenRows]:
    """The rows of all tables; of every token by the adapters that have one."""
    found = {}
    for table in dict.fromkeys(table for adapter in adapters for table in adapter.token_rows):
        held: dict[int, list[tuple[float, Tensor]]] = {}
        for weight, adapter in zip(weights, adapters, strict=True):
            rows = adapter.token_rows.get(table)
            for index, row in zip(rows.indices, rows.rows_TI, strict=True) if rows else ():
                held.setdefault(index, []).append((weight, row))
        widths = {row.shape for parts in held.values() for _, row in parts}
        if len(widths) > 1:
            raise UsageError(f"the rows of {table} have different widths", "are these adapters of one base?")
        made = [_sum(parts, f"token {index} of {table}", method, adds) for index, parts in held.items()]
        found[table] = TokenRows(tuple(held), torch.stack(made))
    return found


def _sum(held: Held, name: str, method: str, adds: bool) -> Tensor:
    """Σ w own of one tensor or row."""
    first = held[0][1]
    if any(other.shape != first.shape for _, other in held):
        raise UsageError(f"{name} has different shapes in the adapters", "are these adapters of one base?")
    if all(torch.equal(first, other) for _, other in held):
        if adds and len(held) == 1 and abs(held[0][0] - 1) > CLOSE:
            raise _needs_base(name, held[0][0])
        return first
    if not adds:
        raise UsageError(f"{name} differs, and --method {method} is for the entries of weights", _adding())
    total = sum(weight for weight, _ in held)
    if abs(total - 1) > CLOSE:
        raise _needs_base(name, total)
    return sum((weight * own.float() for weight, own in held), start=torch.zeros_like(first, dtype=torch.float32))


def _needs_base(name: str, total: float) -> UsageError:
    return UsageError(
        f"{name} takes the place of the base's own, and the weights of the adapters that have it sum to {total:g}: "
        "at any other sum than 1 the base would be needed, which is not here",
        f"give weights that sum to 1 over them (--method linear divides by the sum of all); or {INTO_BASE}",
    )


def _adding() -> str:
    return "use --method exact, linear or svd"


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one
    )
