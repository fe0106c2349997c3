"""A frozen linear layer and its components as one autograd function.

The chain of ordinary operations builds the update as a tensor of its own, adds it to the base's output into a third
one, and in the backward pass adds up two gradients of x. Here both are accumulated in place by the matrix product
itself, and what is kept for the backward pass is x, which the base's neighbours keep as well, and the C-wide product.

Dimensions: N tokens, I inputs, O outputs, C components.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def plain_weight_OI(base: nn.Module) -> Tensor | None:
    """The base's weight as a view [O, I], or None where the base does more than a matrix product with it."""
    kind = type(base)
    if kind is not nn.Linear and kind.__name__ != "Conv1D":
        return None
    weight: Tensor = base.weight  # type: ignore[assignment]
    if weight.requires_grad or not weight.is_floating_point() or base._forward_hooks or base._forward_pre_hooks:
        return None
    return weight if kind is nn.Linear else weight.T


def thin_product(x_NI: Tensor, a_CI: Tensor) -> Tensor:
    """x aᵀ, [N, C].

    On the CPU the kernel for 5 to 15 columns of output is slow (MKL: 1.4 times the time of the transposed product,
    which has 5 to 15 rows); scripts/bench/NOTES.md has the times.
    """
    if x_NI.device.type == "cpu" and 4 < a_CI.shape[0] < 16:
        return (a_CI @ x_NI.T).T
    return x_NI @ a_CI.T


class FusedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x aᵀ) bᵀ, with gradients for x, a and b only.

    Computes in the type that autocast gives the base's product; a and b may be of another. Source of the equations:
    LoRA, arXiv 2106.09685, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_CI: Tensor, b_OC: Tensor, scale: float
    ) -> Tensor:
        y = F.linear(x, weight_OI, bias_O)
        dtype = y.dtype
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        h_NC = thin_product(x_NI, a_CI.to(dtype))
        y.view(-1, y.shape[-1]).addmm_(h_NC, b_OC.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x, h_NC, weight_OI, a_CI, b_OC)
        ctx.scale, ctx.dtype = scale, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h_NC, weight_OI, a_CI, b_OC = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(dtype)
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        grad_h_NC = thin_product(grad_NO, b_OC.to(dtype).T.contiguous()).mul_(scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ weight_OI.to(dtype)
            grad_x = grad_x_NI.addmm_(grad_h_NC, a_CI.to(dtype)).view(x.shape).to(x.dtype)
        grad_a_CI = (grad_h_NC.T @ x_NI).to(a_CI.dtype)
        grad_b_OC = (h_NC.T @ grad_NO).mul_(scale).T.to(b_OC.dtype)  # 2 to 5 times as fast as gradᵀ h on the CPU
        return grad_x, None, None, grad_a_CI, grad_b_OC, None


def fused(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_CI: Tensor, b_OC: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + s (x aᵀ) bᵀ, [..., O]."""
    return FusedLinear.apply(x, weight_OI, bias_O, a_CI, b_OC, scale)
