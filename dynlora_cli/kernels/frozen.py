"""Products with a frozen weight, by whichever of torch's libraries is the fastest on this processor.

For products in fp32 torch asks MKL. On AMD's processors that takes 5 to 20 % longer than oneDNN, which torch has too
(scripts/bench/NOTES.md). It is asked through an operator that torch's own compiler uses.

Dimensions: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_INFO = Path("/proc/cpuinfo")
LEAST_WORK = 1 << 26  # N x I x O; smaller products take less than a millisecond, of which oneDNN loses some to its call


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [N, O]."""
    if by_onednn(x_NI, weight_OI):
        return _onednn(x_NI, weight_OI, bias_O)
    return F.linear(x_NI, weight_OI, bias_O)


def back(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad W, the gradient of x for that of x Wᵀ. [N, I]"""
    if by_onednn(grad_NO, weight_OI):
        return _onednn(grad_NO, weight_OI.T, None)
    return grad_NO @ weight_OI


def add_back(sum_NI: Tensor, grad_NO: Tensor, weight_OI: Tensor) -> None:
    """Add the same to a gradient that is there already."""
    if by_onednn(grad_NO, weight_OI):
        sum_NI.add_(_onednn(grad_NO, weight_OI.T, None))
    else:
        sum_NI.addmm_(grad_NO, weight_OI)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies the two: never on a GPU, while torch compiles, or where autograd is to follow."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and len(x) * weight.numel() >= LEAST_WORK
        and mkl_is_slow()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def mkl_is_slow() -> bool:
    """Whether torch has both libraries, and the processor is one on which MKL is the slower."""
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return there and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _maker() == "AuthenticAMD"


def _maker() -> str:
    """The maker's name as the processor tells it; empty where the system does not say."""
    if platform.system() != "Linux" or not CPU_INFO.is_file():
        return ""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
