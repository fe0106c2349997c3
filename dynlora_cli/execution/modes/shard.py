"""`train.shard_base`: every device holds a part of the frozen base, and a block is whole only while it computes.

FSDP2 gathers a block's weights before its forward and its backward pass and lets go of them afterwards. Components,
and whatever else trains, are whole on every device as without it: their gradients are one all-reduce a step anyway,
and a pruning event changes their shapes.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.execution.blocks import blocks, skips_blocks
from dynlora_cli.lora.pool import Pool


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

    Raises:
        UsageError: the model's blocks cannot be gathered one by one.
    """
    from torch.distributed.fsdp import fully_shard

    parts = list(blocks(model))
    _refuse_unsuitable(model, parts)
    # The head hands on what it was given (kernels/linear_cross_entropy.py), and nobody changes that in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (processes,))
    leaves = set(pool.leaves)
    others = {parameter for parameter in model.parameters() if _stays_whole(parameter, model.dtype)} - leaves
    for parameter in others:
        parameter.data = parameter.data.to(device)
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, ignored_params=leaves | others)


def _stays_whole(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Trained as a whole, such as a new head; or what FSDP2 does not take (until torch 2.10, types that differ)."""
    return parameter.requires_grad or parameter.ndim == 0 or parameter.dtype != dtype


def _refuse_unsuitable(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Processes must gather the same blocks in the same order, and each weight once."""
    hint = "set train.shard_base: false"
    if skips_blocks(model):
        raise UsageError(
            f"train.shard_base: {type(model).__name__} skips blocks at random (layerdrop), each process others", hint
        )
    weights = [id(parameter) for part in parts for parameter in part.parameters()]
    if not parts or len(set(weights)) < len(weights):
        raise UsageError(f"train.shard_base: {type(model).__name__} has no blocks with weights of their own", hint)
