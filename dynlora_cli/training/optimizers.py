"""The optimizers of `train.optimizer`, and their moments as fp32, however they are stored.

    adamw               torch; exp_avg and exp_avg_sq in fp32
    adamw_8bit          bitsandbytes; state1 and state2 as bytes: entries of the table qmap, times absmax of the block
    paged_adamw         bitsandbytes; state1 and state2 in fp32
    paged_adamw_8bit    both

Blocks are of 256 numbers and do not follow components: who changes the moments reads them as fp32 and writes them back.
Paged memory moves to the host where the GPU is full. bitsandbytes never gives it back, so here it is used again.

Source: 8-bit optimizers by block-wise quantization (arXiv 2110.02861); paged ones, QLoRA (arXiv 2305.14314), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import MachineError
from dynlora_cli.lora.moments import BLOCK, SMALLEST

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that cannot run here, before anything is loaded.

    Raises:
        MachineError: bitsandbytes is not installed, or a paged optimizer has no CUDA.
    """
    if name not in BITSANDBYTES:
        return
    _bitsandbytes(name)
    if name.startswith("paged") and device.type != "cuda":
        raise MachineError(
            f"train.optimizer: {name} needs CUDA, and this run is on {device.type}",
            f"on this machine use train.optimizer: {name.removeprefix('paged_')}",
        )


def make_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of a recipe; the loop sets the learning rate of every step.

    Args:
        name: as in the recipe.
        groups: of parameters, as torch takes them.
        weight_decay: of all groups.

    Raises:
        MachineError: bitsandbytes is not installed.
    """
    if name in BITSANDBYTES:
        return getattr(_bitsandbytes(name).optim, BITSANDBYTES[name])(groups, lr=0.0, weight_decay=weight_decay)
    # Fused: one pass over memory instead of ten, 3 to 4 times as fast on the CPU.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=fused)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"train.optimizer: {name} needs bitsandbytes, which cannot be imported: {error}", "pip install bitsandbytes"
        ) from None
    return bitsandbytes


def state_bytes(name: str, parameter: Tensor) -> int:
    """Bytes of a parameter's two moments. Paged ones count in full, wherever they are."""
    numbers = parameter.numel()
    if name.endswith("8bit") and numbers >= SMALLEST:
        return 2 * (numbers + 4 * -(-numbers // BLOCK))
    return 2 * numbers * (4 if name in BITSANDBYTES else parameter.element_size())


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """Give a parameter the state that a checkpoint holds of it, bit by bit."""
    maker: Any = optimizer
    if "state1" in saved:
        state: dict[str, Any] = {key: value.to(parameter.device) for key, value in saved.items()}
        state["step"] = int(saved["step"])
        for key in ("state1", "state2"):
            state[key] = maker.get_state_buffer(parameter, dtype=saved[key].dtype).copy_(saved[key])  # perhaps paged
    else:
        fused = optimizer.defaults.get("fused")  # only then AdamW's step counter is on the parameter's device
        state = {key: value.to(parameter.device) if value.ndim or fused else value for key, value in saved.items()}
    optimizer.state[parameter] = state
