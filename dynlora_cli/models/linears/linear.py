"""What is asked of a linear layer of the base: its shape, its dense weight, and whether kernels can fuse it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fusable(base: nn.Module) -> bool:
    """Whether the base is no more than a product with a frozen weight, and perhaps a bias."""
    name = type(base).__name__
    if type(base) is not nn.Linear and name not in ("Conv1D", "Linear4bit", "ExpertSlice"):
        return False
    weight: Tensor = base.weight  # type: ignore[assignment]
    if weight.requires_grad or base._forward_hooks or base._forward_pre_hooks:
        return False
    if name == "Linear4bit":  # without gradients bitsandbytes' own kernels are better: they dequantize on the fly
        return _quant_state(base) is not None and torch.is_grad_enabled()
    return weight.is_floating_point()


def weight_type(base: nn.Module) -> torch.dtype:
    """The dtype of what `weight_OI` returns."""
    state = _quant_state(base)
    return base.weight.dtype if state is None else state.dtype  # type: ignore[return-value]


def weight_OI(base: nn.Module) -> Tensor:
    """The base's weight [O, I]: a view, or dequantized from 4 bits."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    state = _quant_state(base)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    return weight.T if type(base).__name__ == "Conv1D" else weight


def _quant_state(base: nn.Module) -> Any:
    return None if type(base) is nn.Linear else getattr(base.weight, "quant_state", None)


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer.

    It may be an `nn.Linear`, a quantized one, GPT-2's Conv1D (whose weight is [I, O]), or any module with a weight
    [O, I].
    """
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features  # type: ignore[return-value]
    first, second = base.weight.shape  # type: ignore[misc]
    return (first, second) if type(base).__name__ == "Conv1D" else (second, first)


def forget_input(y: Tensor) -> Tensor:
    """Free the input that bitsandbytes' 8-bit product keeps for the gradient of its weight: the base is frozen.

    bitsandbytes keeps it as an attribute of the autograd node and not as a saved tensor, so that gradient
    checkpointing would not free it either.
    """
    if torch.compiler.is_compiling():  # reading `grad_fn` would cause a graph break
        return y
    node: Any = y.grad_fn
    name = type(node).__name__
    if name == "MatMul8bitLtBackward":
        node.tensors = (None, None, None)
    elif name == "MatMul8bitFpBackward":  # on the CPU
        node.A = None
    return y


def dense_weight(module: nn.Module) -> Tensor:
    """A layer's weight as [O, I] in fp32, dequantized where it is stored in 4 or 8 bits."""
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if hasattr(weight, "SCB"):
        state: Any = module.state
        scb = weight.SCB if weight.SCB is not None else state.SCB
        return weight.data.float() * (scb.view(-1, 1).float() / 127)
    weight = weight.detach().float()
    return weight.T if type(module).__name__ == "Conv1D" else weight
