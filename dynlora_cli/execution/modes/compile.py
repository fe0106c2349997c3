"""`train.compile`: the blocks of the model and the loss as compiled code that stays valid when components are pruned.

The number of components of each layer is a dynamic dimension, so a pruning event needs no new compilation. The sizes 0
and 1 are the exception: torch.compile always specializes on them, so a block is compiled again when one of its layers
gets down to 1 or 0 components.
"""

from __future__ import annotations

import shutil
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynlora_cli.errors import MachineError
from dynlora_cli.execution.blocks import blocks, mark_dynamic
from dynlora_cli.kernels.linear_cross_entropy import Heads, compiled_judge

if TYPE_CHECKING:
    from dynlora_cli.lora.pool import Pool

ORDER = 40
CONFLICTS = [
    {
        "with": "train.gradient_checkpointing",
        "is": "offload",
        "at": "train.compile",
        "why": "compiled blocks keep their inputs themselves",
        "hint": "leave one of the two out",
    }
]
# Compiled versions of one function. All blocks of a kind share one, and beyond this limit torch.compile would silently
# run the rest uncompiled.
MOST_GRAPHS = 64
COMPILERS = ("g++", "clang++", "c++"), ("gcc", "clang", "cc")


def compile_blocks(model: nn.Module, pool: Pool | None) -> None:
    """Have every block, and on a GPU the loss, compiled at the first forward pass.

    Args:
        model: with its components in place.
        pool: holds the components; None where all weights train.

    Raises:
        MachineError: what torch.compile needs is not installed.
    """
    _refuse_without_compiler(next(model.parameters()).device)
    import torch._dynamo.config as dynamo

    dynamo.force_parameter_static_shapes = False
    for limit in ("recompile_limit", "cache_size_limit"):  # the name since torch 2.7, and the older one
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, MOST_GRAPHS)
    # torch.compile reads the .grad of every tensor that it meets, and torch warns of that read.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for block in blocks(model):
        block.compile()
    if next(model.parameters()).device.type == "cuda":  # a compiled loss is slower on a CPU: scripts/bench/NOTES.md
        Heads.compiled = compiled_judge()
    if pool is None:
        return
    pool.joined = True
    marked: list[Any] = [None]

    def mark(*_: Any) -> None:
        # "Dynamic" is a mark on a tensor object, so new objects need it again: the cast copies in every pass, and the
        # leaves after every event.
        fresh = [layer.low for layer in pool.layers.values() if layer.low]
        if marked[0] is not pool.values:
            marked[0] = pool.values
            fresh += [(layer.a_CI, layer.b_OC) for layer in pool.layers.values()]
        mark_dynamic(fresh)

    model.register_forward_pre_hook(mark)


def graphs_made() -> int:
    """How many graphs torch.compile has compiled in this process so far."""
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
