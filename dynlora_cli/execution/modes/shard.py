"""Every device holds a part of the frozen base, and a block is whole only while it computes.

What it does:
    FSDP2 gathers a block's weights before its forward and its backward pass and frees them afterwards. Components, and
    whatever else trains, are not sharded. They are small, their gradients take a single all-reduce a step anyway, and
    a pruning event changes their shapes, which FSDP2 could not follow. A base that was sharded stays so.

When to use it:
    When the base does not fit into one device's memory, or leaves too little for activations; with `--devices N`.

Reference:
    Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.execution import mode
from dynlora_cli.execution.blocks import blocks, skips_blocks
from dynlora_cli.lora.whole import Trained
from dynlora_cli.models.patched import Held, ignore_warnings

KEY, ORDER = "shard_base", 30
CONFLICTS = [
    {
        "with": "rank.elastic",
        "why": "layers in parts have no order of their own yet",
        "hint": "set one of the two back",
    },
    {
        "with": "adapter.variant",
        "is_not": "lora",
        "why": "a sharded base goes with variant lora alone",
        "hint": "set one of the two back",
    },
    {"with": "model.load_in_4bit", "why": "a quantized base lies whole on every device", "hint": "set one to false"},
    {"with": "model.load_in_8bit", "why": "a quantized base lies whole on every device", "hint": "set one to false"},
    {"with": "train.compile", "why": "blocks in parts are not compiled", "hint": "set one of the two to false"},
    {
        "with": "adapter.init_weights",
        "is": ["eva", "inflora"],
        "why": "it looks at the model before there are parts",
        "hint": "leave one of the two out",
    },
    {
        "with": "rank.allocation",
        "is_not": "uniform",
        "while": {"adapter.init_weights": ["default", "orthogonal", "pissa", "loftq"]},  # eva has been told above
        "why": "it looks at the model before there are parts",
        "hint": "leave one of the two out",
    },
]
# FSDP2 warns of a module that returns a view. The stand-in for the head does, it returns its input
# (kernels/linear_cross_entropy.py); but nobody changes that in place, so nothing can go wrong.
VIEWS = Held(partial(ignore_warnings, "FSDP2-wrapped module .* returned a view"))


class Mode(mode.Mode):
    """`train.shard_base`."""

    loads_on_host = True  # no device could hold it
    in_short_runs = False
    no_answers = "with train.shard_base no device has the whole model"

    def refuse(self, device: torch.device, processes: int) -> None:
        refuse_sharding(processes)
        self._device, self._processes = device, processes

    def apply(self, model: PreTrainedModel, trained: Trained) -> None:
        if trained.layers:
            self.patches.enter_context(VIEWS)
            shard_base(model, trained, self._device, self._processes)


def refuse_sharding(processes: int) -> None:
    """Refuse what cannot be sharded, before any file is read.

    Raises:
        UsageError: there is one process.
        MachineError: torch is too old.
    """
    if processes == 1:
        raise UsageError(
            "train.shard_base: one process has nobody to share the base with", "add --devices N, or set it to false"
        )
    if Version(torch.__version__) < Version("2.7"):  # fully_shard has `ignored_params` from 2.7 on
        raise MachineError("train.shard_base needs torch 2.7 or newer", "pip install --upgrade torch")


def shard_base(model: PreTrainedModel, pool: Trained, device: torch.device, processes: int) -> None:
    """Shard the frozen weights: every process keeps its part of them, on its device.

    Args:
        model: on the CPU, with its components in place; changed in place.
        pool: holds the components, which are on the device already.
        device: of this process.
        processes: number of processes of the run, more than one; each has loaded the same model.

    Raises:
        UsageError: the model's blocks cannot be gathered one by one.
    """
    from torch.distributed.fsdp import fully_shard

    parts = list(blocks(model))
    _refuse_unsuitable(model, parts)
    mesh = init_device_mesh(device.type, (processes,))
    leaves = set(pool.leaves)
    others = {parameter for parameter in model.parameters() if _stays_whole(parameter, model.dtype)} - leaves
    for parameter in others:
        parameter.data = parameter.data.to(device)
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, ignored_params=leaves | others)


def _stays_whole(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether a parameter is not to be sharded: it trains, such as a new head, or FSDP2 does not accept it.

    Scalars are never accepted; until torch 2.10, neither is a dtype other than that of the rest.
    """
    return parameter.requires_grad or parameter.ndim == 0 or parameter.dtype != dtype


def _refuse_unsuitable(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """All processes must gather the same blocks in the same order, and every weight belongs to one block only.

    Raises:
        UsageError: this model does otherwise.
    """
    hint = "set train.shard_base: false"
    if skips_blocks(model):
        raise UsageError(
            f"train.shard_base: {type(model).__name__} skips blocks at random (layerdrop), each process others", hint
        )
    weights = [id(parameter) for part in parts for parameter in part.parameters()]
    if not parts or len(set(weights)) < len(weights):
        raise UsageError(f"train.shard_base: {type(model).__name__} has no blocks with weights of their own", hint)
