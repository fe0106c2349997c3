"""The optimizer's moments of single components, also where they are stored in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256  # bitsandbytes quantizes in blocks of so many numbers, each with its own largest value (absmax)


SMALLEST = 4096  # bitsandbytes keeps the moments of tensors with fewer numbers in fp32


MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}  # torch's name: the end of bitsandbytes' names (state1, qmap1)


def read_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's moments as `exp_avg` and `exp_avg_sq`, in its own shape; empty before the first step.

    AdamW's are the optimizer's own tensors; quantized and paged ones come as copies in fp32.
    """
    state = optimizer.state.get(parameter, {})
    if "state1" not in state:
        return {key: state[key] for key in MOMENTS if key in state}
    moments = {}
    for key, n in MOMENTS.items():
        stored = state[f"state{n}"].to(parameter.device)  # paged memory claims to be on the CPU
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
    """Set a parameter's moments, in the form in which the optimizer stores them; its count of steps goes on.

    Args:
        optimizer: steps the parameter.
        parameter: flat.
        moments: as from `read_moments`, in the parameter's shape.
        replaces: the parameter that this one replaces; the optimizer forgets it.
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
    """The value; where the old one is in paged memory, copied to the beginning of that memory, to use it again."""
    if not getattr(before, "is_paged", False) or before.dtype != value.dtype:
        return value
    front: Any = before[: value.numel()]
    front.copy_(value)
    front.is_paged, front.page_deviceid = True, before.page_deviceid  # type: ignore[attr-defined]
    return front


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Reset the optimizer to before its first step, in the memory that it has already."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                state[key] = 0  # bitsandbytes counts its steps in a plain number
            elif not key.startswith("qmap"):
                value.zero_()
