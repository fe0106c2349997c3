"""A cast into memory that stays where it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CastInto(torch.autograd.Function):
    """`values.to(dtype)`, written into memory that exists already: CUDA graphs need it at a fixed address.

    `place` is a tuple so that autograd does not take the tensor in it for an input.
    """

    @staticmethod
    def forward(ctx: Any, values_P: Tensor, place: tuple[Tensor]) -> Tensor:
        ctx.dtype = values_P.dtype
        place[0].copy_(values_P)
        return place[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None]:
        return grad_P.to(ctx.dtype), None
