"""The fused layer against the same layer by ordinary operations: outputs, gradients, precision, what stays unfused."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth, same_curve
from tiny_run import lines, make_recipe, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dynlora_cli.kernels.fused_lora import FusedLinear, fused
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.linear import weight_OI


def layer(base, *, dropout=0.0, count=4, dtype=torch.float32):
    base = base.to(dtype).requires_grad_(False)
    made = ComponentLinear(base, 1.7, dropout)
    pool = Pool({"layer": made}, {"layer": count}, seed=3)
    pool.adopt(torch.randn(pool.parameters, generator=torch.Generator().manual_seed(1), dtype=dtype), pool.counts)
    return made


def bases():
    torch.manual_seed(0)
    conv = Conv1D(20, 12)
    nn.init.normal_(conv.bias)
    return {"bias": nn.Linear(12, 20), "no bias": nn.Linear(12, 20, bias=False), "Conv1D": conv}


def run(made, x, fuse, monkeypatch, context=None):
    """Output and gradients of x, a and b."""
    monkeypatch.setattr(ComponentLinear, "fuse", fuse)
    for parameter in (made.a_CI, made.b_OC):
        parameter.grad = None
    x = x.clone().requires_grad_(True)
    y = made(x) if context is None else context(made, x)
    assert (type(y.grad_fn).__name__ == "FusedLinearBackward") == fuse
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, made.a_CI.grad, made.b_OC.grad


def truth(made, x):
    """The same by the formula, in fp64."""
    x, a, b = (leaf.detach().double().requires_grad_(True) for leaf in (x, made.a_CI, made.b_OC))
    bias = made.base.bias if made.base.bias is None else made.base.bias.double()
    y = F.linear(x, weight_OI(made.base).double() + made.scale * b @ a, bias)
    (y * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum().backward()
    return y.detach(), x.grad, a.grad, b.grad


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (12,), (40, 12), (2, 300, 12)])
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_fused_equals_ordinary_operations(kind, shape, count, monkeypatch):
    made, x = layer(bases()[kind], count=count), torch.randn(shape)
    tokens = x.numel() // 12
    results = run(made, x, True, monkeypatch), run(made, x, False, monkeypatch), truth(made, x)
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        for found in (ours, plain):
            assert_close_to_truth(found, exact, terms=tokens + 12 + 20 + count)


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (12,)])
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_a_model_may_add_to_the_output_in_place(kind, shape, monkeypatch):
    def and_one(made, x):
        y = made(x)
        fused_by = type(y.grad_fn).__name__
        y += 1
        y.mul_(2)
        assert fused_by == "FusedLinearBackward"
        return y

    monkeypatch.setattr(ComponentLinear, "fuse", True)
    made, x = layer(bases()[kind]), torch.randn(shape)
    wanted, *gradients = truth(made, x)
    x = x.requires_grad_(True)
    made.a_CI.grad = made.b_OC.grad = None
    y = and_one(made, x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = y.detach(), x.grad, made.a_CI.grad, made.b_OC.grad
    for ours, exact in zip(found, (2 * wanted + 2, *(2 * gradient for gradient in gradients)), strict=True):
        assert_close_to_truth(ours, exact, terms=2 * (x.numel() + 12 + 20 + 4))


@pytest.mark.parametrize("tokens", [3, 6])
def test_gradients_against_finite_differences(tokens):
    made = layer(nn.Linear(5, 4), count=2, dtype=torch.float64)
    x = torch.randn(2, tokens, 5, dtype=torch.float64, requires_grad=True)
    made.a_CI.grad = made.b_OC.grad = None
    assert torch.autograd.gradcheck(lambda *v: fused(v[0], made.base, v[1], v[2], 0.7), (x, made.a_CI, made.b_OC))


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_autocasts_type(x_type, monkeypatch):
    def bf16(made, x):
        with torch.autocast("cpu", torch.bfloat16):
            return made(x)

    made, x = layer(bases()["bias"]), torch.randn(3, 12).to(x_type)
    results = run(made, x, True, monkeypatch, bf16), run(made, x, False, monkeypatch, bf16), truth(made, x)
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        for found in (ours, plain):  # rounded are x, W, a, b, the product with a, the update, and the sum
            assert_close_to_truth(found, exact, terms=7, dtype=torch.bfloat16)


def test_under_gradient_checkpointing(monkeypatch):
    monkeypatch.setattr(ComponentLinear, "fuse", True)
    made, x = layer(bases()["bias"]), torch.randn(3, 12)
    wanted = truth(made, x)[2:]
    made.a_CI.grad = made.b_OC.grad = None
    y = checkpoint(made, x.requires_grad_(True), use_reentrant=False)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    for ours, exact in zip((made.a_CI.grad, made.b_OC.grad), wanted, strict=True):
        assert_close_to_truth(ours, exact, terms=3 + 12 + 20)


def test_gradients_of_several_backward_passes_add_up(monkeypatch):
    made, x = layer(bases()["bias"]), torch.randn(3, 12)
    monkeypatch.setattr(ComponentLinear, "fuse", True)
    *_, a_once, b_once = truth(made, x)
    made.a_CI.grad, made.b_OC.grad = torch.zeros_like(made.a_CI), torch.zeros_like(made.b_OC)
    places = made.a_CI.grad.data_ptr(), made.b_OC.grad.data_ptr()
    for _ in range(3):
        y = made(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        del y
    assert_close_to_truth(made.a_CI.grad, 3 * a_once, terms=3 + 12 + 20)
    assert_close_to_truth(made.b_OC.grad, 3 * b_once, terms=3 + 12 + 20)
    assert places == (made.a_CI.grad.data_ptr(), made.b_OC.grad.data_ptr()), "in the memory that was there"


def test_the_pool_is_cast_once_and_never_out_of_date(monkeypatch):
    """Copies in bf16 live no longer than a forward pass: an optimizer may change the factors behind torch's back."""
    monkeypatch.setattr(ComponentLinear, "fuse", True)
    made = layer(bases()["bias"])
    pool = Pool({"layer": made}, {"layer": 4}, seed=3)
    model = nn.Sequential(made)
    pool.cast_with(model)
    x, seen = torch.randn(3, 12), []
    made.register_forward_hook(lambda module, inputs, y: seen.append(module.low))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        pool.values.fill_(0.5)
        first = model(x)
        pool.values.data.fill_(0.25)
        second = model(x)
    assert [low[0].dtype for low in seen] == [torch.bfloat16] * 2
    assert made.low is None
    for value, y in ((0.5, first), (0.25, second)):
        factors = torch.full((20, 4), value).double() @ torch.full((4, 12), value).double()
        exact = x.double() @ (made.base.weight.double() + 1.7 * factors).T + made.base.bias.double()
        assert_close_to_truth(y, exact, terms=7, dtype=torch.bfloat16)
    model(x)
    assert seen[-1] is None, "without autocast there is nothing to cast"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bits_equal_ordinary_operations(bias, tokens, monkeypatch):
    import bitsandbytes as bnb

    plain = nn.Linear(64, 128, bias=bias)
    base = bnb.nn.Linear4bit(64, 128, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    if bias:
        base.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    made = ComponentLinear(base.to("cpu").train(), 1.7)  # which quantizes
    values = torch.randn(4 * (64 + 128), generator=torch.Generator().manual_seed(1))
    Pool({"layer": made}, {"layer": 4}).adopt(values, {"layer": 4})
    x = torch.randn(tokens, 64)
    results = run(made, x, True, monkeypatch), run(made, x, False, monkeypatch), truth(made, x)
    for ours, ordinary, exact in zip(*results, strict=True):
        for found in (ours, ordinary):
            assert_close_to_truth(found, exact, terms=tokens + 64 + 128 + 4)


def test_an_input_that_needs_no_gradient_gets_none():
    made = layer(nn.Linear(12, 20))
    y = made(torch.randn(3, 12))
    y.sum().backward()
    assert made.a_CI.grad.abs().sum() > 0


def test_x_is_saved_once_and_nothing_of_the_outputs_size():
    saved = []
    made, x = layer(nn.Linear(64, 96)), torch.randn(50, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(x.requires_grad_(True))
    kept = {t.data_ptr(): t.numel() for t in saved}
    own = {made.base.weight.data_ptr(), made.a_CI.data_ptr(), made.b_OC.data_ptr(), x.data_ptr()}
    assert {n for pointer, n in kept.items() if pointer not in own} == {50 * 4}, "the C-wide product alone"
    assert x.data_ptr() in kept


class Odd(nn.Linear):
    """A linear layer that does more than a product."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("why", ["another class", "a hook", "dropout", "gate", "another type", "switched off"])
def test_what_is_not_fused(why, monkeypatch):
    base = Odd(12, 20) if why == "another class" else nn.Linear(12, 20)
    made = layer(base, dropout=0.5 if why == "dropout" else 0.0)
    x = torch.randn(3, 12)
    if why == "a hook":
        base.register_forward_hook(lambda module, inputs, y: y + 1)
    elif why == "gate":
        made.gate = torch.ones(4)
    elif why == "another type":
        base.to(torch.bfloat16)
        x = x.bfloat16()
    elif why == "switched off":
        monkeypatch.setattr(ComponentLinear, "fuse", False)
    monkeypatch.setattr(FusedLinear, "forward", None)
    torch.manual_seed(0)
    assert made(x).shape == (3, 20)


@pytest.mark.slow
def test_loss_curves_of_both_are_equal(tmp_path, monkeypatch):
    """Through the whole loop, with its events."""
    curves = []
    for switch in (True, False):
        recipe = make_recipe(tmp_path, f"train.fused={str(switch).lower()}", "train.log_steps=1", out=f"out-{switch}")
        train(recipe)
        curves.append([line["loss"] for line in lines(tmp_path / f"out-{switch}" / "metrics.jsonl") if "loss" in line])
    assert len(curves[0]) > 10
    assert curves[0] == same_curve(curves[1])
    assert curves[0] != curves[1], "the recipe's switch does something"
