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

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
BLOCK = 256  # numbers that share an absmax
SMALLEST = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in fp32
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}  # torch's names, and what bitsandbytes' names end in


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


def read_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's moments as `exp_avg` and `exp_avg_sq`, in its own shape; empty before the first step.

    AdamW's are the optimizer's own tensors; quantized and paged ones come as copies in fp32.
    """
    state = optimizer.state.get(parameter, {})
    if "state1" not in state:
        return {key: state[key] for key in MOMENTS if key in state}
    moments = {}
    for key, n in MOMENTS.items():
        stored = state[f"state{n}"].to(parameter.device)  # paged memory looks like the host's
        if stored.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            stored = dequantize_blockwise(stored, absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=BLOCK)
        moments[key] = stored
    return moments


def write_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    moments: Mapping[str, Tensor],
    replaces: nn.Parameter | None = None,
) -> None:
    """Make these a parameter's moments, stored as the optimizer stores them; the count of steps goes on.

    Args:
        optimizer: steps the parameter.
        parameter: flat.
        moments: as from `read_moments`, in the parameter's shape.
        replaces: a parameter that this one comes in place of, and which the optimizer forgets.
    """
    state = optimizer.state.pop(parameter if replaces is None else replaces, {})
    if "state1" not in state:
        optimizer.state[parameter] = {**state, **moments}
        return
    written = {"step": state["step"]}
    for key, n in MOMENTS.items():
        value, before = moments[key], state[f"state{n}"]
        if before.dtype == torch.uint8 and value.numel() >= SMALLEST:
            from bitsandbytes.functional import quantize_blockwise

            value, scales = quantize_blockwise(value, code=state[f"qmap{n}"], blocksize=BLOCK)
            written |= {f"absmax{n}": scales.absmax, f"qmap{n}": state[f"qmap{n}"]}
        written[f"state{n}"] = _in_place_of(before, value)
    optimizer.state[parameter] = written


def _in_place_of(before: Tensor, value: Tensor) -> Tensor:
    """The value, in the front of the memory of what it replaces where that is paged."""
    if not getattr(before, "is_paged", False) or before.dtype != value.dtype:
        return value
    front: Any = before[: value.numel()]
    front.copy_(value)
    front.is_paged, front.page_deviceid = True, before.page_deviceid  # type: ignore[attr-defined]
    return front


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


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Put the optimizer where it was before its first step, in the memory that it has."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                state[key] = 0  # bitsandbytes counts its steps in a plain number
            elif not key.startswith("qmap"):
                value.zero_()
