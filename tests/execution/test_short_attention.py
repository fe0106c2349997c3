"""Short rows attend in fp32 where bf16 is slower, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig

from dynlora_cli.execution.lean_blocks import lean_blocks
from dynlora_cli.execution.short_attention import SHORT, TABLE, ShortAttention, in_fp32, is_slow


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch):
    """As on a CPU with AVX-512's bf16 products and without AMX, whatever the tests run on."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)


def heads(tokens: int = 12, dtype: torch.dtype = torch.bfloat16, *, trains: bool = True) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=random).to(dtype).requires_grad_(trains) for _ in range(3)]


@pytest.mark.parametrize(
    ("given", "slow"),
    [
        (heads(), True),
        (heads(SHORT), True),
        (heads(SHORT + 1), False),
        (heads(dtype=torch.float32), False),
        (heads(trains=False), False),
    ],
)
def test_it_is_for_short_rows_in_bf16_that_train(given, slow, monkeypatch):
    assert is_slow(*given) == slow
    with torch.no_grad():
        assert not is_slow(*given)
    for what, has in (("amx_tile", True), ("avx512_bf16", False)):
        monkeypatch.setattr(torch.cpu, f"_is_{what}_supported", lambda has=has: has)
        assert not is_slow(*given)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_it_is_nearer_to_the_truth_than_bf16_under_autocast_too(mask):
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    allowed = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    added = torch.zeros(2, 1, 12, 12).masked_fill(~allowed, -1e9)
    masks = {None: None, "bool": allowed, "float": added.bfloat16()}
    module = torch.nn.Module()

    def learned(attend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in heads()]
        given = masks[mask].to(dtype) if mask == "float" else masks[mask]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = attend(module, *inputs, given, scaling=0.3)
        y.float().sin().sum().backward()
        assert y.dtype == dtype
        return [y.detach().double(), *(x.grad.double() for x in inputs)]

    truth = learned(usual, torch.float64)
    ours, theirs = learned(in_fp32(usual), torch.bfloat16), learned(usual, torch.bfloat16)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine - exact).norm() <= 1.05 * (other - exact).norm()
        assert (mine - exact).norm() < 0.02 * exact.norm()


def test_a_model_finds_it_in_its_table_and_the_librarys_table_stays():
    attention = LlamaAttention(LlamaConfig(hidden_size=16, num_attention_heads=2), layer_idx=0)
    before = LlamaAttention.forward.__globals__[TABLE]
    lean_blocks(attention)
    table = attention.forward.__func__.__globals__[TABLE]
    assert isinstance(table, ShortAttention)
    assert LlamaAttention.forward.__globals__[TABLE] is before
    assert table.get_interface("eager", max) is max, "another kernel is used as it is"
    assert table["sdpa"].__name__ == table.get_interface("sdpa", max).__name__ == "attend"
    assert table.valid_keys() == before.valid_keys()
    for copied in (copy.copy(table), copy.deepcopy(table)):
        assert list(copied) == list(before)
        assert "sdpa" in copied


def test_what_else_comes_in_bf16_is_left_to_the_usual_kernel():
    seen = []

    def attention(_module, query, *_rest, **_more):
        seen.append(query.dtype)
        return query, None

    for bias in (None, torch.zeros(1, dtype=torch.bfloat16)):
        in_fp32(attention)(torch.nn.Module(), *heads(), None, position_bias=bias)
    assert seen == [torch.float32, torch.bfloat16]
