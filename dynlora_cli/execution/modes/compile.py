"""`train.compile`: the blocks of the model and the loss as compiled code, which stays valid while components go.

A block is compiled with the number of components of each layer unknown, so a pruning event needs no new code. Only 0
and 1 are special to torch.compile; a block in which another layer comes down to that is compiled again.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import MachineError
from dynlora_cli.kernels.linear_cross_entropy import Heads, compiled_judge
from dynlora_cli.lora.layer import ComponentLinear

if TYPE_CHECKING:
    from dynlora_cli.lora.pool import Pool

# Codes of one function, which all blocks share. Beyond it torch.compile would run the rest uncompiled.
MOST_GRAPHS = 64
COMPILERS = ("g++", "clang++", "c++"), ("gcc", "clang", "cc")


def compile_blocks(model: nn.Module, pool: Pool | None) -> None:
    """Compile every block, and the loss, at the first forward pass.

    Args:
        model: with its components in place.
        pool: holds them; None where all weights train.

    Raises:
        MachineError: what torch.compile needs is not installed.
    """
    _refuse_without_compiler(next(model.parameters()).device)
    import torch._dynamo.config as dynamo

    dynamo.force_parameter_static_shapes = False
    for limit in ("recompile_limit", "cache_size_limit"):  # its name since torch 2.7, and before
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, MOST_GRAPHS)
    # torch.compile looks at the .grad of every tensor that it meets, and then warns of it.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for block in blocks(model):
        block.compile()
    if next(model.parameters()).device.type == "cuda":  # on a CPU it is slower, see scripts/bench/NOTES.md
        Heads.compiled = compiled_judge()
    if pool is None:
        return
    pool.joined = True
    marked: list[Any] = [None]

    def mark(*_: Any) -> None:
        fresh = [layer.low for layer in pool.layers.values() if layer.low]
        if marked[0] is not pool.values:  # fresh leaves after every event
            marked[0] = pool.values
            fresh += [(layer.a_CI, layer.b_OC) for layer in pool.layers.values()]
        mark_dynamic(fresh)

    model.register_forward_pre_hook(mark)


def mark_dynamic(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Compile for any number of components of these a_CI and b_OC."""
    for a_CI, b_OC in pairs:
        torch._dynamo.maybe_mark_dynamic(a_CI, 0)
        torch._dynamo.maybe_mark_dynamic(b_OC, 1)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: what its outermost lists of modules hold, and lists in them."""
    return (block for _, _, block in blocks_in_place(model))


def blocks_in_place(model: nn.Module) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    """The blocks, each with the list that holds it and its index in there."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from _parts(child)
        elif not isinstance(child, ComponentLinear):
            yield from blocks_in_place(child)


def skips_blocks(model: nn.Module) -> bool:
    """Whether a training pass may leave out blocks by chance."""
    return any(getattr(module, "layerdrop", 0) for module in model.modules())


def _parts(container: nn.ModuleList) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    for index, part in enumerate(container):
        if isinstance(part, nn.ModuleList):
            yield from _parts(part)
        else:
            yield container, index, part


def graphs_made() -> int:
    """How many pieces of code this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _refuse_without_compiler(device: torch.device) -> None:
    cpp, c = COMPILERS
    wanted = cpp if device.type == "cpu" else c
    if not any(map(shutil.which, wanted)):
        raise MachineError(
            f"train.compile: torch.compile needs a compiler on this machine, one of {', '.join(wanted)}",
            "install one (Debian: apt install g++), or set train.compile: false",
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise MachineError("train.compile: the package triton is not installed", "pip install triton")
