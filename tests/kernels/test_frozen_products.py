"""Products with frozen weights: right by either library, and by the one that is meant."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth

from dynlora_cli.kernels import frozen

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
TOKENS, INPUTS, OUTPUTS = 40, 24, 56


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not ONEDNN, reason="torch has no oneDNN"))])
def operands(request, monkeypatch):
    monkeypatch.setattr(frozen, "mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(frozen, "LEAST_WORK", 1)
    chance = torch.Generator().manual_seed(0)
    shapes = {
        "x": (TOKENS, INPUTS),
        "weight": (OUTPUTS, INPUTS),
        "bias": (OUTPUTS,),
        "grad": (TOKENS, OUTPUTS),
        "before": (TOKENS, INPUTS),
    }
    found = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    with torch.no_grad():
        assert frozen.by_onednn(found["x"], found["weight"]) is request.param
        yield found


def test_forward_and_back(operands):
    exact = {name: tensor.double() for name, tensor in operands.items()}
    x, weight, bias, grad = (operands[name] for name in ("x", "weight", "bias", "grad"))
    y = frozen.linear(x, weight, bias)
    assert_close_to_truth(y, exact["x"] @ exact["weight"].T + exact["bias"], terms=INPUTS + 1)
    assert_close_to_truth(frozen.linear(x, weight, None), exact["x"] @ exact["weight"].T, terms=INPUTS)
    assert_close_to_truth(frozen.back(grad, weight), exact["grad"] @ exact["weight"], terms=OUTPUTS)
    total = operands["before"].clone()
    frozen.add_back(total, grad, weight)
    assert_close_to_truth(total, exact["before"] + exact["grad"] @ exact["weight"], terms=OUTPUTS + 1)


def test_a_weight_in_transposed_memory(operands):
    """As Conv1D's is."""
    weight = operands["weight"].T.contiguous().T
    x, grad = operands["x"], operands["grad"]
    assert_close_to_truth(frozen.linear(x, weight, None), x.double() @ weight.double().T, terms=INPUTS)
    assert_close_to_truth(frozen.back(grad, weight), grad.double() @ weight.double(), terms=OUTPUTS)


def test_onednn_is_for_what_it_is_faster_at(monkeypatch):
    monkeypatch.setattr(frozen, "mkl_is_slow", lambda: True)
    x, weight = torch.zeros(512, 512), torch.zeros(256, 512)
    assert not frozen.by_onednn(x, weight), "autograd would lose its way"
    with torch.no_grad():
        assert frozen.by_onednn(x, weight)
        assert not frozen.by_onednn(x[:2], weight)
        assert not frozen.by_onednn(x.bfloat16(), weight.bfloat16())
        assert not frozen.by_onednn(x.double(), weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not frozen.by_onednn(x, weight)


@pytest.mark.parametrize(
    ("maker", "system", "slow"),
    [("AuthenticAMD", "Linux", ONEDNN), ("GenuineIntel", "Linux", False), ("AuthenticAMD", "Darwin", False)],
)
def test_the_processor_decides(maker, system, slow, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel\t\t: 17\n")
    monkeypatch.setattr(frozen, "CPU_INFO", info)
    monkeypatch.setattr(frozen.platform, "system", lambda: system)
    assert frozen.mkl_is_slow.__wrapped__() is (slow and torch.backends.mkl.is_available())
