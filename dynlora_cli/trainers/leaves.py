"""A trainer's optimizer steps the factors of each layer; the heart prunes one flat tensor. This is what lies between.

The leaves a_CI and b_OC are views of the pool's flat tensor, so a step of a leaf is a step of the pool. The optimizer's
moments are of leaves, too. For a pruning event they are gathered into flat tensors, in a stand-in for an optimizer that
steps the flat tensor, which is what `RankControl` works on. After the event they are given back to the new leaves.

    tie                 leaves that were moved are views of one flat tensor again
    on_flat             an event: gather, act, give back
    replace_leaves      new leaves in the places of old ones, in the optimizer's groups
    refuse_unknown      optimizers whose state cannot be cut

Dimensions: C components of a layer, I inputs, O outputs, P numbers of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.moments import MOMENTS, read_moments, write_moments
from dynlora_cli.lora.pool import Pool

# What optimizers call a running mean of the gradient, and one of its square.
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "square_avg", "sum")
ROW, COLUMN = "exp_avg_sq_row", "exp_avg_sq_col"  # Adafactor's, whose product stands for the square
Result = TypeVar("Result")


def settle(pool: Pool) -> None:
    """After the pool has new leaves: no gradient yet, and those without numbers do not train.

    Trainers give an optimizer the parameters that train. A leaf of a layer without components is none of them, neither
    now nor when a checkpoint is read again.
    """
    pool.values.grad = None
    for leaf in pool.leaves:
        leaf.grad = None
        if not leaf.numel():
            leaf.requires_grad_(False)


def tie(pool: Pool) -> None:
    """Make the leaves views of one flat tensor again, where the model was moved or cast since they were made.

    Components train in fp32 whatever the base is in, so a cast of the whole model to 16 bits is undone for them.
    """
    views = [part for pair in pool.views(pool.values.detach()) for part in pair]
    if all(_same_memory(leaf, view) for leaf, view in zip(pool.leaves, views, strict=True)):
        return
    factors = [layer.a_CI for layer in pool.layers.values()], [layer.b_OC for layer in pool.layers.values()]
    values_P = torch.cat([leaf.detach().reshape(-1) for half in factors for leaf in half])
    values_P = values_P.float() if values_P.dtype in (torch.bfloat16, torch.float16) else values_P
    pool.values = nn.Parameter(values_P)
    for layer, (a_CI, b_OC) in zip(pool.layers.values(), pool.views(values_P), strict=True):
        layer.a_CI.data, layer.b_OC.data = a_CI, b_OC


def _same_memory(leaf: Tensor, view: Tensor) -> bool:
    same = leaf.dtype == view.dtype and leaf.device == view.device
    return same and (not leaf.numel() or leaf.data_ptr() == view.data_ptr())


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, without accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def on_flat(pool: Pool, optimizer: torch.optim.Optimizer, act: Callable[[torch.optim.Optimizer], Result]) -> Result:
    """Do something to the pool and the moments of all its numbers at once.

    Args:
        pool: its leaves are the optimizer's parameters, as far as they train.
        optimizer: of the trainer.
        act: is given an optimizer of the flat tensor, see `RankControl`.

    Returns:
        what `act` returns.

    Raises:
        UsageError: the optimizer keeps something of each number that cannot be cut.
    """
    old = pool.leaves
    found = [_read(optimizer, leaf) for leaf in old]
    stand_in = torch.optim.Optimizer([pool.values], {})
    if any(found):
        flat = {key: torch.zeros_like(pool.values.detach()) for key in MOMENTS}
        for key in MOMENTS:
            for moments, view in zip(found, _parts(pool, flat[key]), strict=True):
                if key in moments:
                    view.copy_(moments[key])
        stand_in.state[pool.values] = flat
    result = act(stand_in)
    if pool.leaves[0] is not old[0]:
        settle(pool)
        replace_leaves(optimizer, old, pool.leaves)
    if any(found):
        flat = stand_in.state[pool.values]
        firsts, seconds = (_parts(pool, flat[key]) for key in MOMENTS)
        for before, leaf, first, second in zip(old, pool.leaves, firsts, seconds, strict=True):
            _write(optimizer, before, leaf, dict(zip(MOMENTS, (first, second), strict=True)))
    return result


def _parts(pool: Pool, flat_P: Tensor) -> list[Tensor]:
    """Views of a flat tensor in the order of the pool's leaves."""
    return [part for pair in pool.views(flat_P) for part in pair]


def replace_leaves(optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
    """Put new leaves where the old ones are in the optimizer's groups; those that do not train are left out."""
    by_id = {id(before): after for before, after in zip(old, new, strict=True)}
    for group in optimizer.param_groups:
        parameters = [by_id.get(id(parameter), parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in parameters if parameter.requires_grad]


def forget_leaves(optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter]) -> None:
    """Drop the state of leaves that are gone."""
    for leaf in old:
        optimizer.state.pop(leaf, None)


# -- what optimizers keep of a parameter -------------------------------------------------------------------------------


def refuse_unknown(optimizer: torch.optim.Optimizer, leaves: Sequence[nn.Parameter]) -> None:
    """
    Raises:
        UsageError: the optimizer keeps something of each number whose meaning is not known, so it cannot be turned into
            another basis and cut.
    """
    for leaf in leaves:
        state = optimizer.state.get(leaf, {})
        if "state1" in state:
            if getattr(optimizer, "optimizer_name", "") != "adam" or "state2" not in state:
                raise _refusal(optimizer, "moments of another meaning than AdamW's")
            continue
        for key, value in state.items():
            known = key in (*FIRST, *SECOND, ROW, COLUMN) or value is None or isinstance(value, int | float)
            plain = type(value) is Tensor or value is None or isinstance(value, int | float)
            if not plain or not (known or (isinstance(value, Tensor) and value.ndim == 0)):
                raise _refusal(optimizer, f"`{key}`, a {type(value).__name__}")


def _refusal(optimizer: torch.optim.Optimizer, what: str) -> UsageError:
    return UsageError(
        f"optimizer {type(optimizer).__name__} keeps {what} of each parameter, "
        "and nobody knows how to cut that when components go",
        "use another, such as optim='adamw_torch'",
    )


def _read(optimizer: torch.optim.Optimizer, leaf: nn.Parameter) -> dict[str, Tensor]:
    """A leaf's moments by AdamW's names, in its shape; empty where it has not been stepped."""
    refuse_unknown(optimizer, [leaf])
    state = optimizer.state.get(leaf, {})
    if "state1" in state:
        return read_moments(optimizer, leaf)
    found: dict[str, Tensor] = {}
    for name, keys in zip(MOMENTS, (FIRST, SECOND), strict=True):
        for key in keys:
            if isinstance(state.get(key), Tensor):
                found[name] = state[key]
    if ROW in state:  # v_ij = row_i · column_j / mean of rows
        row, column = state[ROW], state[COLUMN]
        found["exp_avg_sq"] = torch.outer(row, column) / row.mean().clamp_min(torch.finfo(row.dtype).tiny)
    return found


def _write(
    optimizer: torch.optim.Optimizer, before: nn.Parameter, leaf: nn.Parameter, moments: dict[str, Tensor]
) -> None:
    """Give a leaf the state of the one that it replaces, with these moments; `before` may be the leaf itself."""
    if not optimizer.state.get(before):
        optimizer.state.pop(before, None)
        return
    if not leaf.numel():
        del optimizer.state[before]
        return
    state = optimizer.state[before]
    if "state1" in state:
        write_moments(optimizer, leaf, moments, replaces=before)
        return
    state = optimizer.state.pop(before)
    for name, keys in zip(MOMENTS, (FIRST, SECOND), strict=True):
        for key in keys:
            if isinstance(state.get(key), Tensor):
                state[key] = moments[name]
    if ROW in state:
        state[ROW], state[COLUMN] = moments["exp_avg_sq"].mean(-1), moments["exp_avg_sq"].mean(-2)
    optimizer.state[leaf] = state
