"""O-LoRA's penalty: the equation on small matrices, and what it does to a pool."""

from __future__ import annotations

import math

import pytest
import torch

from dynlora_cli.lora.orthogonality import overlap, overlap_penalty


def drawn(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_sum_of_cosines_between_old_and_new():
    a_CI = drawn(5, 7)
    expected = sum(
        abs(torch.dot(a_CI[i], a_CI[j]).item()) / (a_CI[i].norm() * a_CI[j].norm()).item()
        for i in range(2)
        for j in range(2, 5)
    )
    assert overlap(a_CI, 2).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [8, 64, 512])
def test_its_scale_is_the_same_for_all_widths_and_lengths(width):
    row = drawn(1, width)
    assert overlap(torch.cat([row, 0.01 * row, -30 * row]), 1).item() == pytest.approx(2.0, rel=1e-9)
    q = torch.linalg.qr(drawn(width, 4)).Q.T
    assert overlap(q, 2).item() == pytest.approx(0.0, abs=1e-12)


def test_its_gradient_turns_the_new_rows_away_from_the_old_ones():
    a_CI = drawn(4, 6).requires_grad_()
    before = overlap(a_CI, 2)
    before.backward()
    new = a_CI.detach().clone()
    new -= 1e-3 * a_CI.grad
    assert overlap(new, 2) < before
    assert not a_CI.grad[:2].any(), "the old rows are not moved out of the way"
    # along a row nothing changes: its length is not what the penalty is about
    assert (a_CI.grad * a_CI).sum(1).abs().max().item() == pytest.approx(0.0, abs=1e-9)


def test_layers_without_old_or_without_new_components_add_nothing():
    both, old_only, none = (drawn(4, 6), 3), (drawn(3, 6), 3), (drawn(0, 6), 0)
    assert overlap_penalty([old_only, none, (drawn(2, 6), 0)], 0.5) is None
    found = overlap_penalty([both, old_only, none], 0.5)
    assert found.item() == pytest.approx(0.5 * overlap(*both).item())


def test_a_row_of_zeros_is_no_fault():
    a_CI = torch.zeros(2, 3, requires_grad=True)
    found = overlap_penalty([(a_CI, 1)], 1.0)
    found.backward()
    assert found.item() == 0.0
    assert math.isfinite(a_CI.grad.abs().sum().item())
