"""One frozen linear layer under the components of several runs, each on rows of its own, as one autograd function.

As `FusedLinear` of kernels/fused_lora.py, with which it shares the products: the base multiplies all rows at once, and
each run adds its update to its own rows, in place. No row sees what another run has, not even where that is NaN.

Dimensions: N tokens of all runs, n of one, I inputs, O outputs, C components of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynlora_cli.kernels import frozen
from dynlora_cli.kernels.fused_lora import Factors, add_to_gradient, base_product, in_dtype, thin_product
from dynlora_cli.models.linear import weight_OI


class Share(NamedTuple):
    """One run's part: which tokens are its own, its a_CI and b_OC, their copies in autocast's dtype if any, and s."""

    tokens: slice
    leaves: Factors
    low: Factors | None
    scale: float


class FusedLanes(torch.autograd.Function):
    """y = x Wᵀ + bias, and on each run's tokens + s (x aᵀ) bᵀ, with gradients for x and every a and b.

    The leaves are the last arguments so that autograd sees them; the computation reads them from `shares`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, shares: Sequence[Share], *_: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = base_product(x_NI, base)
        dtype = y_NO.dtype
        factors = [share.low or tuple(in_dtype(leaf, dtype) for leaf in share.leaves) for share in shares]
        products = []
        for share, (a_CI, b_OC) in zip(shares, factors, strict=True):
            h_nC = thin_product(in_dtype(x_NI[share.tokens], dtype), a_CI)
            y_NO[share.tokens].addmm_(h_nC, b_OC.T, alpha=share.scale)
            products.append(h_nC)
        ctx.save_for_backward(x, *products, *(factor for pair in factors for factor in pair))
        ctx.base, ctx.shares, ctx.dtype = base, shares, dtype
        return torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], y_NO.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        shares, dtype = ctx.shares, ctx.dtype
        products, factors = saved[: len(shares)], saved[len(shares) :]
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), in_dtype(grad.reshape(-1, grad.shape[-1]), dtype)
        grad_x_NI = frozen.back(grad_NO, in_dtype(weight_OI(ctx.base), dtype)) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for number, (share, h_nC) in enumerate(zip(shares, products, strict=True)):
            a_CI, b_OC = factors[2 * number : 2 * number + 2]
            grad_nO = grad_NO[share.tokens]
            # dL/dh / s = grad b. The factor s comes with the products below.
            grad_h_nC = thin_product(grad_nO, b_OC.T.contiguous() if grad.device.type == "cpu" else b_OC.T)
            if grad_x_NI is not None:
                grad_x_NI[share.tokens].addmm_(grad_h_nC, a_CI, alpha=share.scale)
            grad_a = None
            if ctx.needs_input_grad[3 + 2 * number]:  # A may be frozen
                product_CI = grad_h_nC.T @ in_dtype(x_NI[share.tokens], dtype)
                grad_a = add_to_gradient(share.leaves[0], product_CI, share.scale)
            found += [grad_a, add_to_gradient(share.leaves[1], (h_nC.T @ grad_nO).T, share.scale)]
        grad_x = None if grad_x_NI is None else in_dtype(grad_x_NI.view(x.shape), x.dtype)
        return grad_x, None, None, *found


def fused_lanes(x: Tensor, base: nn.Module, shares: Sequence[Share]) -> Tensor:
    """The base's output for x with every run's update on its own tokens, [..., O].

    Args:
        x: [..., I].
        base: holds W and the bias; see `fusable`.
        shares: of runs that have components here.
    """
    return FusedLanes.apply(x, base, shares, *(leaf for share in shares for leaf in share.leaves))
