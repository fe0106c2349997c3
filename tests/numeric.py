"""Rounding told from error: a value against its truth in fp64, with a bound from its type and the sums behind it.

Processors add up the same numbers in other orders (vector widths, threads, kernels by shape), so two sums in fp32 are
never compared with each other: each is compared with the truth. Adding up n numbers in any order moves the result by
at most n roundings of the sum of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
Of a tensor we take its largest number for that sum. Products in 16 bits are added up in fp32: only the roundings count.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def rounding(dtype: torch.dtype, terms: int) -> float:
    """What `terms` roundings in a row can do to a number, as a share of it."""
    return terms * torch.finfo(dtype).eps


def assert_close_to_truth(value: Tensor, truth: Tensor, *, terms: int, dtype: torch.dtype | None = None) -> None:
    """A value is the truth but for rounding.

    Args:
        value: computed in the type under test.
        truth: the same in fp64.
        terms: additions and roundings one after another on the longest way to one number of the value.
        dtype: what it was computed in, where that is not the value's own type.
    """
    assert truth.dtype == torch.float64
    assert value.shape == truth.shape
    truth = truth.detach()
    allowed = rounding(dtype or value.dtype, terms) * truth.abs().max().item()
    off = (value.detach().double() - truth).abs().max().item()
    assert off <= allowed, (
        f"off by {off:.3g}, of numbers up to {truth.abs().max():.3g}; rounding explains {allowed:.3g}"
    )


def in_double(model: nn.Module) -> Any:
    """A copy that computes in fp64, but for what a model does in fp32 of its own accord (norms, rotary angles)."""
    model = copy.deepcopy(model).double()
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the grouped kernels have no fp64
    return model


def same_loss(expected: Any) -> Any:
    """A mean loss, or several, computed a second time by other sums: the tokens' roundings average out.

    Logits are of the size of one, however small the loss is.
    """
    return pytest.approx(expected, rel=rounding(torch.float32, 64), abs=rounding(torch.float32, 64))


def same_curve(expected: Any) -> Any:
    """The losses of a training run that is done a second time by other sums.

    A step of Adam goes as far for a gradient that is nothing but rounding as for any other, so weights drift apart. On
    the tiny models the losses of 20 steps then differ by up to 1e-6; all weights off by 1e-5 at the start give as much.
    """
    return pytest.approx(expected, rel=1e-4)
