"""torch.compile for the blocks of the model and the loss, as code that stays valid when components are pruned.

What it does:
    The number of components of each layer is a dynamic dimension, so a pruning event needs no new compilation. The
    sizes 0 and 1 are the exception: torch.compile always specializes on them, so a block is compiled again when one of
    its layers gets down to 1 or 0 components.

When to use it:
    On a GPU, for runs that are long beside the minute that compiling takes. On a CPU it gains little.

Reference:
    Ansel et al. 2024, PyTorch 2 (ASPLOS), doi 10.1145/3620665.3640366.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynlora_cli.errors import MachineError
from dynlora_cli.execution import mode
from dynlora_cli.execution.blocks import blocks, mark_dynamic
from dynlora_cli.kernels.linear_cross_entropy import compiled_judge, ending
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.patched import Held, Patches, ignore_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.whole import Trained

ORDER = 40
CONFLICTS = [
    {"with": "rank.elastic", "why": "each step would be compiled anew", "hint": "set one to false"},
    {
        "with": "train.gradient_checkpointing",
        "is": "offload",
        "at": "train.compile",
        "why": "compiled blocks keep their inputs themselves",
        "hint": "leave one of the two out",
    },
]
# Compiled versions of one function. All blocks of a kind share one, and beyond this limit torch.compile would silently
# run the rest uncompiled.
MOST_GRAPHS = 64
COMPILERS = ("g++", "clang++", "c++"), ("gcc", "clang", "cc")


class Mode(mode.Mode):
    """`train.compile`."""

    in_short_runs = False
    no_answers = "train.compile would compile for every length of text"

    def begin(
        self, model: PreTrainedModel, trained: Trained, forward: Callable[[], object], tell: Callable[[str], None]
    ) -> None:
        # Not before: the check of packed rows has run the model in another precision, which would be compiled as well.
        self._before = graphs_made()
        self.changed = compile_blocks(model, trained if isinstance(trained, Pool) else None, self.patches)

    def report(self) -> list[str]:
        return [f"torch.compile made {graphs_made() - self._before} graphs"]


def _set_up_compiler() -> Callable[[], None]:
    import torch._dynamo.config as dynamo

    # torch.compile reads the .grad of every tensor that it meets, and torch warns of that read.
    unfilter = ignore_warnings("The .grad attribute of a Tensor that is not a leaf")
    wanted: dict[str, Any] = {"force_parameter_static_shapes": False}
    # The name since torch 2.7, and the older one.
    wanted |= {name: MOST_GRAPHS for name in ("recompile_limit", "cache_size_limit") if hasattr(dynamo, name)}
    before = {name: getattr(dynamo, name) for name in wanted}
    for name, value in wanted.items():
        setattr(dynamo, name, value)

    def undo() -> None:
        unfilter()
        for name, value in before.items():
            setattr(dynamo, name, value)

    return undo


COMPILER = Held(_set_up_compiler)


def compile_blocks(model: nn.Module, pool: Pool | None, patches: Patches | None = None) -> list[str]:
    """Have every block, and on a GPU the loss, compiled at the first forward pass.

    Args:
        model: with its components in place.
        pool: holds the components; None where all weights train.
        patches: undo it again; None: it stays for good.

    Returns:
        the names of the blocks.

    Raises:
        MachineError: what torch.compile needs is not installed.
    """
    _refuse_without_compiler(next(model.parameters()).device)
    patches = patches or Patches()
    patches.enter_context(COMPILER)
    compiled = dict.fromkeys(blocks(model))
    for block in compiled:
        patches.set(block, "_compiled_call_impl", None)  # as it is without; `compile` sets it
        block.compile()
    if next(model.parameters()).device.type == "cuda":  # a compiled loss is slower on a CPU: scripts/bench/NOTES.md
        patches.set(ending(model), "judge", compiled_judge())
    if pool is not None:
        _make_dynamic(model, pool, patches)
    return [name for name, module in model.named_modules() if module in compiled]


def _make_dynamic(model: nn.Module, pool: Pool, patches: Patches) -> None:
    """Tell torch.compile in every pass that the number of components may be another one the next time."""
    patches.set(pool, "joined", True)
    marked: list[Any] = [None]

    def mark(*_: Any) -> None:
        # "Dynamic" is a mark on a tensor object, so new objects need it again: the cast copies in every pass, and the
        # leaves after every event.
        fresh = [layer.low for layer in pool.layers.values() if layer.low]
        if marked[0] is not pool.values:
            marked[0] = pool.values
            fresh += [(layer.a_CI, layer.b_OC) for layer in pool.layers.values()]
        mark_dynamic(fresh)

    patches.callback(model.register_forward_pre_hook(mark).remove)


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
