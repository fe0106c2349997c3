"""The blocks of a transformer: finding them, and what may be assumed of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear


def mark_dynamic(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Tell torch.compile that the number of components of these a_CI and b_OC varies."""
    for a_CI, b_OC in pairs:
        torch._dynamo.maybe_mark_dynamic(a_CI, 0)
        torch._dynamo.maybe_mark_dynamic(b_OC, 1)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: the members of its outermost `nn.ModuleList`s, and of lists nested in these."""
    return (block for _, _, block in blocks_in_place(model))


def blocks_in_place(model: nn.Module) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    """The blocks, each with the list that holds it and its index in that list."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from _parts(child)
        elif not isinstance(child, ComponentLinear):
            yield from blocks_in_place(child)


def skips_blocks(model: nn.Module) -> bool:
    """Whether a training pass may skip blocks at random (layerdrop)."""
    return any(getattr(module, "layerdrop", 0) for module in model.modules())


def _parts(container: nn.ModuleList) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    for index, part in enumerate(container):
        if isinstance(part, nn.ModuleList):
            yield from _parts(part)
        else:
            yield container, index, part


def draws(model: nn.Module) -> bool:
    """Whether a training pass of this model may draw random numbers, judging by its modules and their configs.

    Looks for dropout, jitter or noise above zero. It misses routers of experts that sample without such a setting.
    """
    parts = [vars(part) for module in model.modules() for part in (module, getattr(module, "config", None)) if part]
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for part in parts
        for name, value in part.items()
        if any(word in name for word in ("drop", "jitter", "noise"))
    )
