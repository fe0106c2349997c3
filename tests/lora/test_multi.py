"""One layer with the components of several adapters: both ways to compute it, gradients, types, and whose rows are whose."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynlora_cli.lora.multi import Choice, MultiLinear
from dynlora_cli.lora.ways.plan import Plan
from dynlora_cli.models.linear import dense_weight

D_IN, D_OUT = 12, 20
RANKS = {0: 3, 2: 1, 3: 5}  # by column of the bank; column 1 has nothing here
# Runs, a request by itself, the base, a blend, a blend with a negative weight, and columns that are no neighbours.
WEIGHTS_BE = torch.tensor(
    [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0.7, 0, 0.3, 0], [0, 0, 0, 1], [1, 0, 0, -0.5]]
)


def a_layer(base=None, seed=0):
    torch.manual_seed(seed)
    layer = MultiLinear(base or nn.Linear(D_IN, D_OUT).requires_grad_(False), "some.layer", Choice())
    layer.hold([(c, torch.randn(r, layer.in_features), torch.randn(layer.out_features, r)) for c, r in RANKS.items()])
    return layer


def truth(layer, weights_BE, x):
    """fp64, one request at a time, from dense weights. [B, T, O]"""
    rows = []
    for weights, x_TI in zip(weights_BE.double(), x.double(), strict=True):
        W_OI = dense_weight(layer.base).double()
        for column, part in zip(layer.adapters, layer.slices, strict=True):
            W_OI = W_OI + weights[column] * (layer.b_OR[:, part].double() @ layer.a_RI[part].double())
        bias = layer.base.bias
        rows.append(x_TI @ W_OI.T + (0 if bias is None else bias.double()))
    return torch.stack(rows)


@pytest.fixture(params=["mask", "stack", "segments"])
def way(request, monkeypatch):
    """Each of the ways, whatever the sizes."""
    monkeypatch.setattr(Plan, "way", lambda plan, tokens: "mask" if plan.one_mix else request.param)
    return request.param


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", ["batch", "flat", "each token"])
@pytest.mark.usefixtures("way")
def test_every_row_is_computed_with_its_own_mix(shape, grad):
    layer = a_layer()
    x = torch.randn(len(WEIGHTS_BE), 1 if shape == "each token" else 5, D_IN)
    layer.choice.weights_BE = WEIGHTS_BE
    with torch.set_grad_enabled(grad):
        y = layer(x.flatten(0, 1) if shape == "flat" else x).view(*x.shape[:2], D_OUT)
    assert_close_to_truth(y, truth(layer, WEIGHTS_BE, x), terms=60)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("row", range(len(WEIGHTS_BE)))
def test_where_all_requests_have_one_mix_it_does_not_matter_whose_rows_they_are(row):
    layer = a_layer()
    weights_BE = WEIGHTS_BE[row].expand(3, -1)
    layer.choice.weights_BE = weights_BE
    x = torch.randn(7, 2, D_IN)  # not 3 requests
    with torch.no_grad():
        assert_close_to_truth(layer(x), truth(layer, WEIGHTS_BE[row].expand(7, -1), x), terms=60)


def test_without_a_mix_it_is_the_base():
    layer = a_layer()
    x = torch.randn(2, 3, D_IN)
    assert layer(x).equal(layer.base(x))
    layer.choice.weights_BE = torch.zeros(2, 4)
    assert layer(x).equal(layer.base(x))
    layer.choice.weights_BE = torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 0]])  # of an adapter that has nothing here
    assert layer(x).equal(layer.base(x))


def test_rows_that_are_not_of_the_requests_are_refused():
    layer = a_layer()
    layer.choice.weights_BE = WEIGHTS_BE[:3]
    for shape in ((4, 6, D_IN), (8, D_IN), (1, 3, D_IN)):
        with pytest.raises(ValueError, match=r"some\.layer .* 3 requests"):
            layer(torch.randn(shape))


def test_several_rows_of_one_request_follow_one_another():
    layer = a_layer()
    x = torch.randn(2 * len(WEIGHTS_BE), 3, D_IN)
    layer.choice.weights_BE = WEIGHTS_BE
    assert_close_to_truth(layer(x), truth(layer, WEIGHTS_BE.repeat_interleave(2, 0), x), terms=60)


@pytest.mark.usefixtures("way")
def test_what_inference_mode_made_can_be_used_with_gradients():
    with torch.inference_mode():
        layer = a_layer()
        layer.choice.weights_BE = WEIGHTS_BE
        layer(torch.randn(len(WEIGHTS_BE), 2, D_IN))
    layer.base = nn.Linear(D_IN, D_OUT)
    x = torch.randn(len(WEIGHTS_BE), 2, D_IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.usefixtures("way")
def test_the_gradient_of_the_input_is_right():
    layer = a_layer().double()
    layer.choice.weights_BE = WEIGHTS_BE.double()
    x = torch.randn(len(WEIGHTS_BE), 2, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_the_gradient_of_the_weights_is_right():
    layer = a_layer().double()
    x = torch.randn(len(WEIGHTS_BE), 2, D_IN, dtype=torch.float64)

    def output(weights_BE):
        layer.choice.weights_BE = weights_BE
        return layer(x)

    assert torch.autograd.gradcheck(output, WEIGHTS_BE.double().requires_grad_())
    assert torch.autograd.gradcheck(output, WEIGHTS_BE[:1].double().requires_grad_())


class Router(nn.Module):
    """Gates that depend on x and on h, so that both gradients are asked for."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, D_IN, dtype=torch.float64))

    def gates(self, layer, x_NI, h_NR):
        return (x_NI @ self.weight.T + h_NR.mean(-1, keepdim=True)).softmax(-1)


@pytest.mark.parametrize("width", [len(RANKS), sum(RANKS.values())])
def test_a_router_weighs_adapters_or_components_by_token(width):
    layer = a_layer().double()
    layer.choice.gates = router = Router(width)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    x_NI = x.flatten(0, 1)
    gates = router.gates(layer, x_NI, x_NI @ layer.a_RI.T)
    if width == len(RANKS):
        gates = gates.repeat_interleave(torch.tensor(list(RANKS.values())), 1)
    expected = layer.base(x_NI) + torch.stack(
        [layer.b_OR @ (g * (layer.a_RI @ row)) for g, row in zip(gates, x_NI, strict=True)]
    )
    torch.testing.assert_close(y.flatten(0, 1), expected)
    assert torch.autograd.gradcheck(layer, x)
    y.sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "bfloat16", "autocast"])
def test_it_computes_as_components_do_on_every_kind_of_base(kind):
    torch.manual_seed(1)
    base = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT, bias=kind != "no bias")
    base.requires_grad_(False)
    x = torch.randn(len(WEIGHTS_BE), 2, D_IN)
    if kind == "bfloat16":
        base, x = base.bfloat16(), x.bfloat16()
    layer = a_layer(base)
    layer.choice.weights_BE = WEIGHTS_BE
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if kind in ("bfloat16", "autocast") else torch.float32)
    # In 16 bits: base and update are rounded, and their sum; with autocast the factors too. Sums are in fp32.
    terms = {"bfloat16": 3, "autocast": 8}.get(kind, 60)
    assert_close_to_truth(y, truth(layer, WEIGHTS_BE, x), terms=terms)


def test_only_adapters_of_the_batch_cost_anything():
    layer = a_layer()
    layer.choice.weights_BE = torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 0]])
    layer(torch.randn(2, 3, D_IN))
    (plan,) = layer.choice.mixes.plans.values()
    assert plan.a_RI.shape == (1, D_IN)
    assert plan.a_RI.data_ptr() == layer.a_RI[3].data_ptr()  # a view


def test_the_base_output_is_not_changed_where_others_hold_it():
    layer = a_layer()
    seen = []
    layer.base.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    layer.choice.weights_BE = WEIGHTS_BE
    with torch.no_grad():
        layer(torch.randn(len(WEIGHTS_BE), 2, D_IN))
    ((now, then),) = seen
    assert now.equal(then)


def test_the_way_follows_the_sizes():
    layer = MultiLinear(nn.Linear(256, 256), "l", Choice())
    layer.hold([(c, torch.randn(8, 256), torch.randn(256, 8)) for c in range(32)])

    def way(weights_BE, tokens):
        layer.choice.weights_BE = weights_BE
        return layer._plan(layer.choice.mixes).way(tokens)

    few, many = torch.eye(32)[:4], torch.eye(32)
    assert way(few, 2) == "mask"
    assert way(many, 1) == way(many, 128) == "stack"
    again = torch.eye(32)[:4].repeat(32, 1)  # the copies of a stack would be many times the components
    assert way(again, 1) == "mask"
    assert way(again, 4096) == "segments"
    assert way(torch.eye(32)[:1].expand(8, -1), 4096) == "mask"
