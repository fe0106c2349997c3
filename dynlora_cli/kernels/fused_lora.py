"""A frozen linear layer and its components as one autograd function; or several layers that read the same input.

What it saves compared with x Wᵀ + s (x aᵀ) bᵀ in ordinary operations:

- Forward: the update is not built as a tensor of its own and then added into a third one. The last product adds to
  the base's output in place (`addmm_`).
- Backward: the two gradients of x are accumulated in the same way.
- Memory: only x and the C-wide product x aᵀ are saved. Other operations usually save x as well, so that it costs
  nothing extra. With a frozen A (LoRA-FA, arXiv 2308.03303) x is not saved either.
- Gradients of a and b are added to `.grad` here, by the operation that scales them; autograd would need another one.

Layers that read the same input (q, k and v; gate and up) share the products with it. Their a are stacked, so x aᵀ is
one product for all of them, and so is the gradient of all a; the gradient of x is accumulated over the layers.

Dimensions: N tokens, I inputs, O outputs of one layer, C components: in b_OC those of one layer, elsewhere of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynlora_cli.kernels import frozen
from dynlora_cli.models.linear import weight_OI

Factors = tuple[Tensor, Tensor]  # a_CI and b_OC


def thin_product(x_NI: Tensor, a_CI: Tensor) -> Tensor:
    """x aᵀ, [N, C].

    On the CPU, MKL's fp32 kernel is slow for outputs of 2 to 15 columns: up to four times as slow as the transposed
    product, as long as the operands are small. scripts/bench/NOTES.md has the times.
    """
    (count, inner), tokens = a_CI.shape, x_NI.shape[0]
    slow = x_NI.device.type == "cpu" and x_NI.dtype == torch.float32 and 1 < count < 16
    if slow and count * max(tokens, inner) <= 1 << 13:
        return (a_CI @ x_NI.T).T
    return x_NI @ a_CI.T


class Part(NamedTuple):
    """One of the layers: the module with W and the bias, its a and b, and their copies in autocast's dtype, if any."""

    base: nn.Module
    leaves: Factors
    low: Factors | None = None


class FusedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x aᵀ) bᵀ of every part, with gradients for x, a and b only.

    Computes in the dtype of the base's product under autocast, whatever the dtype of a and b. The leaves are the last
    arguments so that autograd sees them; the computation reads them from `parts`.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Part], scale: float, *_: Tensor) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        ys = [base_product(x_NI, part.base) for part in parts]
        dtype = ys[0].dtype
        a, b = zip(*(part.low or tuple(in_dtype(leaf, dtype) for leaf in part.leaves) for part in parts), strict=True)
        a_CI = torch.cat(a) if len(a) > 1 else a[0]  # the a of all parts, one above the other
        h_NC = thin_product(in_dtype(x_NI, dtype), a_CI)
        for y_NO, h, b_OC in zip(ys, _split(h_NC, b), b, strict=True):
            y_NO.addmm_(h, b_OC.T, alpha=scale)
        a_trains = ctx.needs_input_grad[3]  # of the first part; A trains in all parts or in none
        ctx.save_for_backward(x if a_trains else None, h_NC, a_CI, *b)
        ctx.parts, ctx.scale, ctx.dtype, ctx.x_dtype = parts, scale, dtype, x.dtype
        # With an ordinary `view`, autograd would forbid the model to change the outputs in place.
        return tuple(torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], y_NO.shape[1])) for y_NO in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h_NC, a_CI, *b = ctx.saved_tensors
        parts, scale, dtype = ctx.parts, ctx.scale, ctx.dtype
        grads_NO = [in_dtype(grad.reshape(-1, grad.shape[-1]), dtype) for grad in grads]
        # dL/dh / s = grad b, of all parts side by side. The factor s comes with the products below.
        on_cpu = a_CI.device.type == "cpu"
        thin = [
            thin_product(grad_NO, b_OC.T.contiguous() if on_cpu else b_OC.T)
            for grad_NO, b_OC in zip(grads_NO, b, strict=True)
        ]
        grad_h_NC = torch.cat(thin, 1) if len(thin) > 1 else thin[0]
        grad_x = None
        if ctx.needs_input_grad[0]:  # dL/dx = Σ over the parts of grad W, + s grad_h a
            grad_x_NI = frozen.back(grads_NO[0], in_dtype(weight_OI(parts[0].base), dtype))
            for grad_NO, part in zip(grads_NO[1:], parts[1:], strict=True):
                frozen.add_back(grad_x_NI, grad_NO, in_dtype(weight_OI(part.base), dtype))
            grad_x_NI.addmm_(grad_h_NC, a_CI, alpha=scale)
            grad_x = in_dtype(grad_x_NI.view(*grads[0].shape[:-1], a_CI.shape[1]), ctx.x_dtype)
        grads_a: Sequence[Tensor | None] = [None] * len(parts)
        if x is not None:  # dL/da = s grad_hᵀ x
            products = (grad_h_NC.T @ in_dtype(x.reshape(-1, x.shape[-1]), dtype)).split([b_OC.shape[1] for b_OC in b])
            grads_a = [add_to_gradient(part.leaves[0], p, scale) for part, p in zip(parts, products, strict=True)]
        found: list[Tensor | None] = [grad_x, None, None]
        for part, grad_a, h, grad_NO in zip(parts, grads_a, _split(h_NC, b), grads_NO, strict=True):
            # dL/db = s gradᵀ h. On the CPU (hᵀ grad)ᵀ is 2 to 5 times as fast.
            grad_b = add_to_gradient(part.leaves[1], (h.T @ grad_NO).T, scale)
            found += [grad_a, grad_b]
        return tuple(found)


def base_product(x_NI: Tensor, base: nn.Module) -> Tensor:
    """x Wᵀ + bias, [N, O]."""
    weight, bias = weight_OI(base), base.bias
    return frozen.linear(x_NI, weight, bias if bias is None else bias.to(weight.dtype))  # type: ignore[arg-type]


def _split(h_NC: Tensor, b: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of h that belong to each part."""
    return h_NC.split([b_OC.shape[1] for b_OC in b], 1) if len(b) > 1 else (h_NC,)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. Calls torch only if it has to: a step comes here hundreds of times."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def add_to_gradient(leaf: Tensor, product: Tensor, scale: float) -> Tensor | None:
    """Add scale x product to the leaf's `.grad`, or return it for autograd if there is no `.grad` to add to.

    There is none where a or b is not a leaf but computed from one. `product` may be overwritten.
    """
    if not leaf.is_leaf or leaf.grad is None:
        return product.mul_(scale).to(leaf.dtype)
    leaf.grad.add_(product, alpha=scale)
    return None


def fused(x: Tensor, base: nn.Module, a_CI: Tensor, b_OC: Tensor, scale: float, low: Factors | None = None) -> Tensor:
    """x Wᵀ + bias + s (x aᵀ) bᵀ, [..., O].

    Args:
        x: [..., I].
        base: holds W and the bias; see `fusable`.
        a_CI, b_OC: leaves, or computed from leaves.
        scale: s.
        low: the same two in autocast's dtype, if they have been cast already.
    """
    return fused_together(x, [Part(base, (a_CI, b_OC), low)], scale)[0]


def fused_together(x: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, ...]:
    """As `fused`, for several layers that read x: the output [..., O] of each."""
    return FusedLinear.apply(x, parts, scale, *(leaf for part in parts for leaf in part.leaves))
