"""Trained rows of tables of tokens: what an adapter's files say of them.

PEFT names the tokens in adapter_config.json, once for the input table (a list) or by the ends of modules' names (a
dictionary), and keeps the rows of each table as `token_adapter.trainable_tokens_delta`. In spite of that name they are
the rows themselves: PEFT puts them in the place of the base's own.

Source: peft 0.21, tuners/trainable_tokens/layer.py: get_merged_weights; utils/other.py:
set_additional_trainable_modules.

Dimensions: T trained tokens, I width of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dynlora_cli.adapters.adapter import TokenRows
from dynlora_cli.adapters.find import CONFIG
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN

LIST = "trainable_token_indices"
TOKEN_ADAPTER = ".token_adapter.base_layer"  # between a table's name and its own tensors
ALONE = "token_indices"  # of PEFT's kind that has nothing else


def token_rows(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> dict[str, TokenRows]:
    """The rows of every table.

    Args:
        tensors: [T, I], by the table's module.
        config: adapter_config.json, checked by `PeftForm`.
        file: the tensors are from, for messages.

    Raises:
        UsageError: a token stands there twice, or tokens and rows do not go together.
    """
    named = config.get(LIST) or config.get(ALONE) or {}
    if named and not tensors:
        raise UsageError(f"{file.parent / CONFIG} names trained tokens, and {file.name} lacks their rows", COPY_AGAIN)
    found = {}
    for module, rows_TI in tensors.items():
        indices = named if isinstance(named, list) else _of(module, named, tensors, file)
        if not indices:
            raise UsageError(f"{file}: {module} has rows of tokens, and {CONFIG} does not say of which", COPY_AGAIN)
        if twice := sorted({token for token in indices if indices.count(token) > 1}):
            raise UsageError(f"{file.parent / CONFIG}: the token {twice[0]} of {module} stands there twice", COPY_AGAIN)
        if rows_TI.ndim != 2 or len(rows_TI) != len(indices):
            raise UsageError(
                f"{file}: {module} has rows of shape {tuple(rows_TI.shape)}, and {CONFIG} names {len(indices)} tokens",
                "one of the two files is of another adapter; copy both again",
            )
        found[module] = TokenRows(tuple(indices), rows_TI)
    return found


def _of(module: str, named: Mapping[str, list[int]], tensors: Mapping[str, Tensor], file: Path) -> list[int]:
    """The tokens of a module: under the end of its name, as PEFT looks for it.

    A tied head that PEFT saves beside its input table is not named; its tokens are those of the table with its rows.
    """
    ends = [end for end in named if module.endswith(end)]
    if not ends:
        twins = [name for name, rows in tensors.items() if name != module and rows.equal(tensors[module])]
        ends = [end for end in named if any(name.endswith(end) for name in twins)]
    if len({tuple(named[end]) for end in ends}) > 1:
        raise UsageError(
            f"{file.parent / CONFIG}: {LIST} names {module} more than once: {', '.join(sorted(ends))}", COPY_AGAIN
        )
    return named[ends[0]] if ends else []


def indices_of(rows: Mapping[str, TokenRows]) -> dict[str, list[int]]:
    """`trainable_token_indices` of adapter_config.json: by full names, which hold for tied and untied tables alike."""
    return {module: list(own.indices) for module, own in rows.items()}


def tensors_of(rows: Mapping[str, TokenRows]) -> dict[str, Tensor]:
    """The rows by their names in adapter_model.safetensors, without the prefix."""
    return {f"{module}.token_adapter.trainable_tokens_delta": own.rows_TI for module, own in rows.items()}
