"""Factors as they are saved in bf16 or fp8, at a scale of exactly 1.

fp8 (e4m3) has three bits of mantissa from 2⁻⁶ to 448, and steps of 2⁻⁹ below. A component's two vectors stand in one
product, so a power of two moves between them without an error, to where both lose least:

    b aᵀ = (2⁻ᵏ b) (2ᵏ a)ᵀ

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.errors import MeasureError

TORCH = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp16": torch.float16,
}
LARGEST = {"fp8": 448.0, "fp16": 65504.0}  # of formats in which a number may be too large, or too small
# The most that rounding may change a number: a share of it, and what is less than the smallest step.
BOUNDS = {"float32": (0.0, 0.0), "bf16": (2.0**-8, 2.0**-134), "fp8": (2.0**-4, 2.0**-10), "fp16": (2.0**-11, 2.0**-25)}
_NEAR = (0, -1, 1, -2, 2)  # powers of two around those at which both vectors reach as high


def rounded(a_CI: Tensor, b_OC: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """The factors with values that the format has, in fp32; they come back as they are when they are rounded again.

    Args:
        a_CI, b_OC: fp32, with the scale in b.
        dtype: of config/dtypes.py.

    Raises:
        MeasureError: a component is too large for the format.
    """
    if dtype == "float32":
        return a_CI, b_OC
    if dtype in LARGEST:
        a_CI, b_OC = balanced(a_CI, b_OC, dtype)
    a, b = _through(a_CI, dtype), _through(b_OC, dtype)
    for before, after in ((a_CI, a), (b_OC, b)):
        relative, absolute = BOUNDS[dtype]
        if not bool(((after - before).abs() <= (relative * before.abs()).clamp(min=absolute)).all()):
            raise MeasureError(f"a number of a component cannot be rounded to {dtype}", "save it as float32")
    alive_C = a.any(1) & b.any(0)  # half of a component does nothing
    return a * alive_C[:, None], b * alive_C


def balanced(a_CI: Tensor, b_OC: Tensor, dtype: str = "fp8") -> tuple[Tensor, Tensor]:
    """The same components with a power of two moved between their vectors, so that a format changes both the least.

    Raises:
        MeasureError: a component is too large at any.
    """
    top_C, other_C = a_CI.abs().amax(1).double(), b_OC.abs().amax(0).double()
    alive_C = (top_C > 0) & (other_C > 0)
    ratio_C = torch.where(alive_C, other_C / top_C.clamp(min=1e-300), torch.ones_like(top_C))
    middle_C = (ratio_C.clamp(min=1e-300).log2() / 2).round()
    best_C = torch.full_like(top_C, torch.inf)
    power_C = torch.zeros_like(top_C)
    # Nothing moves where that loses nothing: factors that are rounded already stay as they are.
    for k_C in (torch.zeros_like(middle_C), *(middle_C + near for near in _NEAR)):
        a, b = a_CI * k_C.exp2().to(a_CI)[:, None], b_OC * (-k_C).exp2().to(b_OC)
        fits_C = (top_C * k_C.exp2() <= LARGEST[dtype]) & (other_C * (-k_C).exp2() <= LARGEST[dtype])
        lost_C = _lost(a, 1, dtype) + _lost(b, 0, dtype)
        better_C = fits_C & (lost_C < best_C)
        best_C, power_C = torch.where(better_C, lost_C, best_C), torch.where(better_C, k_C, power_C)
    if bool((alive_C & best_C.isinf()).any()):
        largest = f"{LARGEST[dtype]:.0f}"
        raise MeasureError(
            f"a component is too large for {dtype}, whose largest number is {largest}", "save it as bf16"
        )
    power_C = torch.where(alive_C, power_C, torch.zeros_like(power_C))
    if not bool(alive_C.all()):  # half of a component that does nothing could be too large
        a_CI, b_OC = a_CI * alive_C[:, None], b_OC * alive_C
    return a_CI * power_C.exp2().to(a_CI)[:, None], b_OC * (-power_C).exp2().to(b_OC)


def _lost(x: Tensor, across: int, dtype: str) -> Tensor:
    """What rounding makes of vectors: squared error over squared length."""
    error = (_through(x.clamp(-LARGEST[dtype], LARGEST[dtype]), dtype) - x).square().sum(across)
    return (error / x.square().sum(across).clamp(min=1e-30)).double()


def _through(x: Tensor, dtype: str) -> Tensor:
    return x.to(TORCH[dtype]).to(x.dtype)


def changed(before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]) -> float:
    """‖ΔW' - ΔW‖ / ‖ΔW‖ over all layers, of pairs a_CI and b_OC; from thin products."""
    lost = whole = 0.0
    for (a, b), (a2, b2) in zip(before, after, strict=True):
        wide_a, wide_b = torch.cat([a, a2]).double(), torch.cat([-b, b2], 1).double()
        lost += max(0.0, ((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum().item())
        whole += max(0.0, ((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum().item())
    return (lost / whole) ** 0.5 if whole else 0.0
