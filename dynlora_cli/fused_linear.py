"""A frozen linear layer and its components as one autograd function.

The chain of ordinary operations builds the update as a tensor of its own, adds it to the base's output into a third
one, and in the backward pass adds up two gradients of x. Here both are accumulated in place by the matrix product
itself, and what is kept for the backward pass is x, which the base's neighbours keep as well, and the C-wide product;
where A is frozen, the latter alone (LoRA-FA, arXiv 2308.03303). The gradients of the factors are added to what is in
`.grad` right away; autograd would add them in an operation more.

Dimensions: N tokens, I inputs, O outputs, C components.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]  # a_CI and b_OC


def fusable(base: nn.Module) -> bool:
    """Whether all that the base does is one product with a frozen weight, and perhaps a bias."""
    name = type(base).__name__
    if type(base) is not nn.Linear and name not in ("Conv1D", "Linear4bit", "ExpertSlice"):
        return False
    weight: Tensor = base.weight  # type: ignore[assignment]
    if weight.requires_grad or base._forward_hooks or base._forward_pre_hooks:
        return False
    if name == "Linear4bit":  # without gradients bitsandbytes has kernels that need no dequantized weight
        return _quant_state(base) is not None and torch.is_grad_enabled()
    return weight.is_floating_point()


def weight_type(base: nn.Module) -> torch.dtype:
    """The type of the numbers that `weight_OI` gives."""
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


def thin_product(x_NI: Tensor, a_CI: Tensor) -> Tensor:
    """x aᵀ, [N, C].

    On the CPU the kernel for 2 to 15 columns of output is slow (MKL: up to four times the time of the transposed
    product, as long as that is small); scripts/bench/NOTES.md has the times.
    """
    count, tokens = a_CI.shape[0], x_NI.shape[0]
    if x_NI.device.type == "cpu" and 1 < count < 16 and count * tokens <= 1 << 13:
        return (a_CI @ x_NI.T).T
    return x_NI @ a_CI.T


class FusedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x aᵀ) bᵀ, with gradients for x, a and b only.

    Computes in the type that autocast gives the base's product; a and b may be of another. Source of the equations:
    LoRA, arXiv 2106.09685, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Module, leaves: Factors, low: Factors | None, scale: float, *_: Tensor
    ) -> Tensor:
        weight, bias = weight_OI(base), base.bias
        y = F.linear(x, weight, bias if bias is None else bias.to(weight.dtype))  # type: ignore[arg-type]
        dtype = y.dtype
        a_CI, b_OC = low or (_in(leaf, dtype) for leaf in leaves)
        x_NI = _in(x.reshape(-1, x.shape[-1]), dtype)
        h_NC = thin_product(x_NI, a_CI)
        y.view(-1, y.shape[-1]).addmm_(h_NC, b_OC.T, alpha=scale)
        a_trains = ctx.needs_input_grad[5]
        ctx.save_for_backward(x if a_trains else None, h_NC, a_CI, b_OC)
        ctx.base, ctx.leaves, ctx.scale, ctx.dtype, ctx.x_dtype = base, leaves, scale, dtype, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h_NC, a_CI, b_OC = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        grad_NO = _in(grad.reshape(-1, grad.shape[-1]), dtype)
        grad_h_NC = thin_product(grad_NO, b_OC.T.contiguous() if grad.device.type == "cpu" else b_OC.T)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ _in(weight_OI(ctx.base), dtype)
            grad_x_NI.addmm_(grad_h_NC, a_CI, alpha=scale)
            grad_x = _in(grad_x_NI.view(*grad.shape[:-1], a_CI.shape[1]), ctx.x_dtype)
        grad_a_CI = None
        if x is not None:
            x_NI = _in(x.reshape(-1, x.shape[-1]), dtype)
            grad_a_CI = add_to_gradient(ctx.leaves[0], grad_h_NC.T @ x_NI, scale)
        grad_b_OC = add_to_gradient(ctx.leaves[1], (h_NC.T @ grad_NO).T, scale)  # on the CPU 2 to 5 times gradᵀ h
        return grad_x, None, None, None, None, grad_a_CI, grad_b_OC


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this type; where it is already, without the call into torch, of which a step has hundreds."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def add_to_gradient(leaf: Tensor, product: Tensor, scale: float) -> Tensor | None:
    """Add scale x product to the leaf's gradient; where it has none, or is no leaf, return that for autograd."""
    if not leaf.is_leaf or leaf.grad is None:
        return product.mul_(scale).to(leaf.dtype)
    leaf.grad.add_(product, alpha=scale)
    return None


def fused(x: Tensor, base: nn.Module, a_CI: Tensor, b_OC: Tensor, scale: float, low: Factors | None = None) -> Tensor:
    """x Wᵀ + bias + s (x aᵀ) bᵀ, [..., O].

    Args:
        x: [..., I].
        base: holds W and the bias; see `fusable`.
        a_CI, b_OC: leaves, or made of leaves.
        scale: s.
        low: the two in the type that autocast computes in, where that is at hand.
    """
    return FusedLinear.apply(x, base, (a_CI, b_OC), low, scale, a_CI, b_OC)
