"""RMS norm, gated feed-forward and rotary positions as autograd functions that compute less and save less.

Written in ordinary operations, as in transformers:
- an RMS norm in bf16 saves its input in fp32 for the backward pass; here it is saved in bf16, as it came;
- a gated feed-forward saves activation(gate) besides the gate; here it is computed again from the gate;
- rotary positions read and write queries and keys five times; here twice.

Dimensions: D features, B rows, H heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Factor = Callable[[Tensor], Tensor]
# The factor that a norm multiplies with, computed from its weight. Families of models differ in its dtype, too: the
# normalized x is rounded to that dtype before the product.
FACTORS: tuple[Factor, ...] = (
    lambda weight_D: weight_D,  # Llama and most others
    lambda weight_D: weight_D.float(),  # OLMo 2
    lambda weight_D: 1.0 + weight_D.float(),  # Gemma
)


class Activation(NamedTuple):
    """An activation, and its backward: (gradient of the output, input) -> gradient of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = (
    Activation(F.silu, torch.ops.aten.silu_backward),
    Activation(F.gelu, torch.ops.aten.gelu_backward),
    Activation(partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
)


class RMSNorm(torch.autograd.Function):
    """y = factor x / √(mean(x²) + ε), with a gradient for x only; computed in fp32. `share` is 1 / √(...).

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, factor: Factor, epsilon: float) -> Tensor:
        factor_D = factor(weight_D)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        share = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, share)
        ctx.factor = factor
        y = torch.mul(x, share, out=torch.empty_like(x, dtype=factor_D.dtype))
        return y.mul_(factor_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, share = ctx.saved_tensors
        factor_D = ctx.factor(weight_D)
        # With g = grad factor and r = share: dL/dx = r g - x r³ Σ(g x) / D. The second term comes from r.
        scaled = (grad.to(factor_D.dtype) * factor_D).float()
        along = (scaled * x).sum(-1, keepdim=True).mul_(share.pow(3).div_(x.shape[-1]))
        return scaled.mul_(share).addcmul_(x, along, value=-1).to(x.dtype), None, None, None


class Gated(torch.autograd.Function):
    """activation(gate) · up; the backward pass computes activation(gate) again instead of saving it.

    Source: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202), equation 5.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate = ctx.activation.backward(grad * up, gate)
        return grad_gate, ctx.activation.forward(gate).mul_(grad), None


class Rotary(torch.autograd.Function):
    """Rotary positions: in queries and keys [B, H, T, D], each pair of features (i, i + D/2) is rotated by an angle.

    The backward pass is the rotation by the negative angle.

    Source: Su et al. 2021, RoFormer (arXiv 2104.09864), equation 34, with the halves of a head as pairs.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        cos, sin = cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1)
        turned = [_turned(x, cos, sin) for x in (queries, keys)]
        needed = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(y for y, need in zip(turned, needed, strict=False) if not need))
        return tuple(turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (angle.unsqueeze(1) for angle in ctx.saved_tensors)
        # The transpose of `_turned`. Its halves swap the sines as well, in case a model gives them different ones.
        back = -sin.roll(sin.shape[-1] // 2, -1)
        needed = ctx.needs_input_grad
        found = [_turned(grad, cos, back) if need else None for grad, need in zip(grads, needed, strict=False)]
        return (*found, None, None)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, where rotate_half(x) = (-second half of x, first half of x)."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y
