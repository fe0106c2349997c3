"""Factors in one gauge depend on the update alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynlora_cli.lora.svd_basis import one_gauge


def factors(rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=chance).double() for shape in ((rank, 9), (7, rank)))  # type: ignore[return-value]


@pytest.mark.parametrize("change", ["turned", "signs", "order", "scale moved", "a direction twice"])
def test_the_same_update_has_the_same_factors_however_it_is_written(change: str):
    a, b = factors()
    T = {
        "turned": torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double(),
        "signs": torch.diag(torch.tensor([-1.0, 1.0, -1.0])).double(),
        "order": torch.eye(3).double()[[2, 0, 1]],
        "scale moved": 50 * torch.eye(3).double(),
    }.get(change)
    if T is None:
        other = torch.cat([a, a[:1]]), torch.cat([b[:, :1] / 2, b[:, 1:], b[:, :1] / 2], 1)
    else:
        other = T @ a, b @ torch.linalg.inv(T)
    assert other[0].shape != a.shape or not torch.allclose(other[0], a)
    for one, again in zip(one_gauge(a, b, 3), one_gauge(*other, 3), strict=True):
        torch.testing.assert_close(one, again)


def test_it_is_the_balanced_svd_with_the_largest_number_of_a_row_positive():
    a, b = factors()
    a2, b2 = one_gauge(a, b, 3)
    torch.testing.assert_close(b2 @ a2, b @ a)
    sigma = torch.linalg.svdvals(b @ a)[:3]
    torch.testing.assert_close(a2 @ a2.T, torch.diag(sigma))
    torch.testing.assert_close(b2.T @ b2, torch.diag(sigma))
    for row in a2:
        assert row[row.abs().argmax()] > 0


def test_fewer_are_followed_by_zeros_and_more_are_cut_to_the_best_approximation():
    a, b = factors()
    a5, b5 = one_gauge(a, b, 5)
    assert (a5.shape, b5.shape) == ((5, 9), (7, 5))
    assert not a5[3:].any()
    assert not b5[:, 3:].any()
    torch.testing.assert_close(b5 @ a5, b @ a)
    a1, b1 = one_gauge(a, b, 1)
    lost = torch.linalg.matrix_norm(b @ a - b1 @ a1)
    torch.testing.assert_close(lost, torch.linalg.svdvals(b @ a)[1:].norm())
    wide, tall = torch.randn(12, 9).double(), torch.randn(7, 12).double()
    a12, b12 = one_gauge(wide, tall, 12)
    assert (a12.shape, b12.shape) == ((12, 9), (7, 12))
    torch.testing.assert_close(b12 @ a12, tall @ wide)


def test_an_update_of_zeros_has_factors_of_zeros():
    a, b = factors()
    assert not any(part.any() for part in one_gauge(a, torch.zeros_like(b), 4))
    a32, b32 = one_gauge(a.float(), b.float(), 4)
    assert (a32.dtype, b32.dtype) == (torch.float32, torch.float32)
