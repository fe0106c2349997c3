"""`train.shard_base`: every device holds a part of the frozen base, and a block is whole only while it computes.

FSDP2 gathers a block's weights before its forward and its backward pass and lets go of them afterwards. Components,
and whatever else trains, are whole on every device as without it: their gradients are one all-reduce a step anyway,
and a pruning event changes their shapes.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from dynlora_cli.compile_blocks import blocks
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.pool import Pool


def refuse_sharding(processes: int) -> None:
    """Say why the base cannot be sharded, before anything is read.

    Raises:
        UsageError: there is one process.
        MachineError: torch is too old.
    """
    if processes == 1:
        raise UsageError(
            "train.shard_base: one process has nobody to share the base with", "add --devices N, or set it to false"
        )
    if Version(torch.__version__) < Version("2.7"):  # whose fully_shard can be told what to leave whole
        raise MachineError("train.shard_base needs torch 2.7 or newer", "pip install --upgrade torch")


def shard_base(model: PreTrainedModel, pool: Pool, device: torch.device, processes: int) -> None:
    """Leave every process its part of the frozen weights, on its device.

    Args:
        model: on the CPU, with its components in place; changed in place.
        pool: holds them, on the device already.
        device: of this process.
        processes: all of the run, each with the same model; more than one.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    leaves = {leaf for layer in pool.layers.values() for leaf in (layer.a_CI, layer.b_OC)}  # views of the pool
    others = {parameter for parameter in model.parameters() if parameter.requires_grad} - leaves
    for parameter in others:  # such as a new head
        parameter.data = parameter.data.to(device)
    parts: list[nn.Module] = [*blocks(model), model]
    for part in parts:
        fully_shard(part, mesh=mesh, ignored_params=leaves | others)
