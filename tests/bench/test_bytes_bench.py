"""The table of scripts/bench/bytes: what it compares with what, and at which sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path[:0] = [str(BENCH / "bytes"), str(BENCH)]

import bytes_table as table  # noqa: E402 - they are scripts, not a package


def line(method, rank, form, size, loss, task="t"):
    cell = {"task": task, "method": method, "budget": rank, "seed": 0, "rate": 1e-3}
    return {"what": "form", **cell, "form": form, "bytes": size, "test": loss}


LINES = [
    line("lora", 1, "float32", 400, 2.0), line("lora", 1, "fp8", 100, 2.0), line("lora", 2, "float32", 800, 1.8),
    line("lora", 2, "fp8", 200, 1.8), line("dynlora", 1, "fp8", 100, 1.98), line("dynlora", 4, "fp8", 400, 1.6),
    line("dynlora", 4, "float32", 1600, 1.6),
]  # fmt: skip


def test_the_page_compares_at_one_size_three_times():
    text = table.page(LINES)
    row = next(row for row in text.splitlines() if row.startswith("| fp8 |") and "pairs" in row)
    # 400 bytes: 1.6 against 2.0 in float32; nothing in bf16; 100 and 200 bytes in the same format
    assert "-20.0% (1 pairs)" in row
    assert "no size in common" in row
    assert f"{((1.98 / 2.0 + 1.79 / 1.8) / 2 - 1):+.1%} (2 pairs)" in row


@pytest.mark.parametrize(("size", "loss"), [(100, 1.98), (200, 1.79), (400, 1.6), (99, None), (401, None)])
def test_losses_between_two_sizes_are_on_a_line_over_the_logarithm(size, loss):
    assert table.at([(100, 1.98), (400, 1.6)], size) == (None if loss is None else pytest.approx(loss))


def test_a_curve_leaves_out_what_is_larger_and_worse():
    cells = {
        ("t", "lora", 1): {"fp8": line("lora", 1, "fp8", 100, 2.0)},
        ("t", "lora", 2): {"fp8": line("lora", 2, "fp8", 200, 2.1)},
    }
    assert table.curve(cells, "t", "lora", ["fp8"]) == [(100, 2.0)]


def test_what_a_format_costs_is_against_the_same_adapter():
    text = table.page(LINES)
    assert "| fp8 | +0.00% | +0.00% | +0.00% | 3 | 0.25 |" in text
