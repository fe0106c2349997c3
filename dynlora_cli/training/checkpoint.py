"""Checkpoints: everything a run needs to go on, bit for bit on the CPU.

    step-N/
      adapter_config.json  adapter_model.safetensors     a plain adapter of that step, loadable by itself
      state.safetensors                                  parameters, optimizer moments, averages, random generators
      state.json                                         counts, position, the run's identity, and sizes and hashes of
                                                         the files above; written last

No pickle anywhere, so a checkpoint from elsewhere can be opened safely.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import STATE, fault_of, seal
from dynlora_cli.training.optimizers import restore_state


def write_state(
    folder: Path,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor],
    position: Mapping[str, Any],
) -> None:
    """Write state.safetensors and state.json into a checkpoint folder that holds its adapter already.

    Args:
        folder: of the checkpoint.
        parameters: everything that trains, in a fixed order.
        optimizer: steps them; its per-parameter tensors are kept.
        averages: of the rank control.
        position: step and whatever else resuming needs, as JSON.
    """
    tensors = {f"control.{key}": value for key, value in averages.items()}
    for index, parameter in enumerate(parameters):
        tensors[f"parameter.{index}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    on_cpu = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    (folder / "state.safetensors").write_bytes(save(on_cpu, metadata={"format": "pt"}))
    seal(folder, position)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The position and the tensors of a checkpoint in which `fault_of` finds no fault.

    Raises:
        UsageError: the tensors cannot be read.
    """
    try:
        tensors = load_file(folder / "state.safetensors")
    except SafetensorError as error:
        raise UsageError(f"{folder / 'state.safetensors'} is damaged: {error}") from None
    return json.loads((folder / STATE).read_text(encoding="utf-8")), tensors


def fault_in(folder: Path, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint, in words, or None.

    As `fault_of`, and one of version 0.1 is opened as well: it has no hashes that would tell.
    """
    if fault := fault_of(folder, record):
        return fault
    try:
        position, tensors = read_state(folder)
        if "sha256" not in position:
            torch.Generator().set_state(tensors["random.cpu"])
            if not all(isinstance(count, int) for count in (position["parameters"], *position["counts"].values())):
                return f"is damaged: {STATE} is not as it was written"
    except (UsageError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"is damaged: {error}"
    return None


def restore(
    tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put parameters, moments and random generators back; returns the averages for the rank control.

    The parameters must have the checkpoint's shapes already.

    Raises:
        UsageError: the checkpoint is of other parameters.
    """
    for index, parameter in enumerate(parameters):
        saved = tensors.get(f"parameter.{index}")
        if saved is None or saved.shape != parameter.shape:
            raise UsageError(
                "the checkpoint does not fit the model and the recipe", "resume with the recipe it was made by"
            )
        parameter.data.copy_(saved)
        prefix = f"optimizer.{index}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        restore_state(optimizer, parameter, state)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    prefix, device = "control.", parameters[0].device
    return {
        # Bytes are the state of a generator, which lives on the CPU.
        key.removeprefix(prefix): value if value.dtype == torch.uint8 else value.to(device)
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
