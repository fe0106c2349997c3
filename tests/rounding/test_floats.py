"""Factors in bf16 and fp8: no number further away than the format says, the product at a scale of 1, the smaller loss."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from dynlora_cli.config.dtypes import rounding_note
from dynlora_cli.errors import MeasureError
from dynlora_cli.files.tensor_file import file_bytes
from dynlora_cli.rounding.floats import TORCH, balanced, changed, rounded


def factors(a_size, b_size, components=4):
    generator = torch.Generator().manual_seed(0)
    a_CI = a_size * torch.randn(components, 96, generator=generator)
    return a_CI, b_size * torch.randn(64, components, generator=generator)


@pytest.mark.parametrize(("a_size", "b_size"), [(0.1, 0.3), (1e-4, 1e3), (300.0, 1e-3), (3e4, 1e-5)])
def test_a_power_of_two_moves_and_the_product_stays(a_size, b_size):
    a_CI, b_OC = factors(a_size, b_size)
    a, b = balanced(a_CI, b_OC)
    assert max(a.abs().max(), b.abs().max()) <= 448
    assert torch.equal(b[:, :1] @ a[:1], b_OC[:, :1] @ a_CI[:1]), "a power of two is exact"
    ratio_C = (a / a_CI)[:, 0]
    assert torch.equal(ratio_C, ratio_C.log2().round().exp2())
    naive = a_CI.clamp(-448, 448).to(TORCH["fp8"]).float(), b_OC.clamp(-448, 448).to(TORCH["fp8"]).float()
    lost = changed([(a_CI, b_OC)], [rounded(a_CI, b_OC, "fp8")])
    assert lost < 0.06
    assert lost <= changed([(a_CI, b_OC)], [naive])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_is_rounded_once_stays(dtype):
    a, b = rounded(*factors(0.02, 0.05), dtype)
    again = rounded(a, b, dtype)
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)
    assert torch.equal(a.to(TORCH[dtype]).float(), a)


def test_components_of_zeros_and_those_too_small_do_nothing():
    a_CI, b_OC = factors(0.1, 0.1)
    b_OC[:, 1] = 0.0
    a_CI[2] *= 1e-12
    a, b = rounded(a_CI, b_OC, "fp8")
    assert not a[1].any()
    assert not b[:, 2].any()
    assert a[0].any()


def test_what_is_too_large_for_fp8_is_refused():
    with pytest.raises(MeasureError, match="too large for fp8"):
        rounded(*factors(1e3, 1e3), "fp8")


def test_the_size_of_a_file_is_known_before_it_is_written():
    tensors = {
        "b.lora_A.weight": torch.zeros(3, 5, dtype=torch.float8_e4m3fn), "a": torch.zeros(7),
        "ä.lora_B.weight": torch.zeros(1000, 2, dtype=torch.bfloat16), "c": torch.zeros(2, 2, dtype=torch.uint8),
    }  # fmt: skip
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
    shapes = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert file_bytes(shapes) == len(save(tensors, metadata={"format": "pt"}))


def test_a_note_says_what_kind_of_loss_it_is():
    assert "too small" not in rounding_note("fp8", 0.04)
    assert "bf16 keeps more of them" in rounding_note("fp8", 0.2)
    assert "most of it is lost" in rounding_note("fp8", 1.0)
