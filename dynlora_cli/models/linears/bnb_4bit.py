"""bitsandbytes' `Linear4bit`: NF4 or FP4, dequantized for every product. This is QLoRA's base.

Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), sections 2 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

quantized = True


def matches(cls: type) -> bool:
    return any(base.__name__ == "Linear4bit" for base in cls.__mro__)  # by name: importing bitsandbytes takes a second


def dense(base: nn.Module) -> Tensor:
    return weight_OI(base).float()


def fuses(base: nn.Module) -> bool:
    """Without gradients bitsandbytes' own kernels are better: they dequantize on the fly."""
    return type(base).__name__ == "Linear4bit" and _state(base) is not None and torch.is_grad_enabled()


def weight_OI(base: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = base.weight
    return dequantize_4bit(weight.data, weight.quant_state)


def weight_type(base: nn.Module) -> torch.dtype:
    return _state(base).dtype


def _state(base: nn.Module) -> Any:
    """What dequantizing needs: block sizes and scales. None before the weight was quantized."""
    return getattr(base.weight, "quant_state", None)
