"""Principal directions, and components that count from where they started."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth
from torch.nn import functional as F

from dynlora_cli.config.budget import parse_budget
from dynlora_cli.lora.directions import Directions, leading, orthonormal_rows, principal_factors
from dynlora_cli.lora.pissa import RelativeLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import plan_start
from dynlora_cli.lora.surgery import shrink


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- directions ------------------------------------------------------------------------------------------------------


def test_principal_factors_are_the_best_approximation():
    W = torch.randn(12, 10, generator=seeded()).double()
    a, b = principal_factors(W, 3, scale=4.0)
    u, s, vh = torch.linalg.svd(W)
    torch.testing.assert_close(4.0 * b @ a, u[:, :3] @ torch.diag(s[:3]) @ vh[:3])
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_directions_of_a_stream_are_those_of_all_vectors_at_once():
    x = torch.randn(90, 10, generator=seeded()) * torch.linspace(3, 0.5, 10) + 5.0
    found = Directions(10)
    for part in x.split([1, 30, 0, 59]):
        found.add(part)
    centred = x.double() - x.double().mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    assert_close_to_truth(found.scaled_CI.norm(dim=1), s, terms=90 + 10)
    cosines = (F.normalize(found.scaled_CI[:4]).double() * vh[:4]).sum(1).abs()
    assert_close_to_truth(cosines, torch.ones(4).double(), terms=90 + 10, dtype=torch.float32)
    assert_close_to_truth(
        torch.tensor(found.explained()), s.square() / centred.square().sum(), terms=2 * (90 + 10), dtype=torch.float32
    )


def test_few_of_many_directions_are_nearly_the_best():
    x = torch.randn(4, 50, 10, generator=seeded()) * torch.tensor([9, 7, 5, *[0.5] * 7])
    found = Directions(3)
    for part in x:
        found.add(part)
    kept = orthonormal_rows(found.scaled_CI, 3, seeded())
    torch.testing.assert_close(kept[:, :3].norm(), torch.tensor(3.0).sqrt(), rtol=1e-2, atol=0)
    assert len(found.explained()) == 3


def test_missing_directions_are_drawn_orthonormal():
    rows = torch.zeros(3, 8)
    rows[0, 2], rows[1, 5] = 7.0, -3.0
    full = orthonormal_rows(rows, 5, seeded())
    assert_close_to_truth(full.double() @ full.double().T, torch.eye(5).double(), terms=2 * 8, dtype=torch.float32)
    assert_close_to_truth(full[:2], F.normalize(rows[:2].double()), terms=2 * 8)


def test_the_randomized_svd_leaves_no_trace_in_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = (leading(torch.eye(40), 4)[0] for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, two)


# -- components that count from their start --------------------------------------------------------------------------


def relative_layer(count=4, d_in=10, d_out=12):
    """In fp64: these tests are about equations."""
    base = torch.nn.Linear(d_in, d_out).double().requires_grad_(False)
    with torch.no_grad():
        base.weight.normal_(generator=seeded())
        base.bias.normal_(generator=seeded(1))
    layer = RelativeLinear(base, 2.0)
    pool = Pool({"layer": layer}, {"layer": count})
    pool.adopt(pool.values.detach().double(), pool.counts)
    layer.begin_at(*principal_factors(base.weight, count, 2.0))
    return layer, pool


def train_a_little(pool, x, steps=5):
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        pool.values.grad.zero_()
        pool.layers["layer"](x).square().sum().backward()
        pool.settle_gradient()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_pissa_starts_as_the_base_with_principal_triplets(dropout):
    layer, _ = relative_layer()
    layer.dropout = dropout
    x = torch.randn(3, 10, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base(x))
    u, s, vh = torch.linalg.svd(layer.base.weight)
    principal = layer.scale * layer.b_OC[:12] @ layer.a_CI[:, :10]
    torch.testing.assert_close(principal, u[:, :4] @ torch.diag(s[:4]) @ vh[:4])


def test_it_computes_the_weight_plus_what_changed():
    layer, pool = relative_layer()
    x = torch.randn(3, 10, generator=seeded(2), dtype=torch.float64)
    a_start, b_start = layer.a_CI[:, :10].clone(), layer.b_OC[:12].clone()
    train_a_little(pool, x)
    assert torch.equal(layer.a_CI[:, 10:], a_start), "the start does not train"
    assert torch.equal(layer.b_OC[12:], b_start)
    a, b = layer.a_CI[:, :10], layer.b_OC[:12]
    assert (a - a_start).abs().max() > 1e-2
    W = layer.base.weight + 2.0 * (b @ a - b_start @ a_start)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.base.bias))
    each = torch.stack([2.0 * (torch.outer(b[:, i], a[i]) - torch.outer(b_start[:, i], a_start[i])) for i in range(4)])
    torch.testing.assert_close(pool.magnitudes_K(), each.flatten(1).norm(dim=1))
    torch.testing.assert_close(layer.delta_OI(), each.sum(0))


def test_a_component_that_goes_leaves_the_others_as_they_were():
    layer, pool = relative_layer()
    x = torch.randn(3, 10, generator=seeded(2), dtype=torch.float64)
    optimizer = train_a_little(pool, x)
    gone = [1, 3]
    a, b = layer.a_CI.detach().clone(), layer.b_OC.detach().clone()
    share = 2.0 * (b[:12, gone] @ a[gone, :10] - b[12:, gone] @ a[gone, 10:])
    expected = layer(x).detach() - F.linear(x, share)
    keep = torch.tensor([True, False, True, False])
    with pool.masked(keep), torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    shrink(pool, optimizer, keep)
    torch.testing.assert_close(layer(x).detach(), expected)
    shrink(pool, optimizer, torch.tensor([False, True]))
    assert pool.parameters == 2 * (10 + 12), "in the files a component is two products"
    train_a_little(pool, x)


@pytest.mark.parametrize("settled", [True, False])
def test_the_gate_stands_before_both_products(settled):
    layer, pool = relative_layer()
    x, weight = (
        torch.randn(3, 10, generator=seeded(2), dtype=torch.float64),
        torch.randn(3, 12, generator=seeded(3), dtype=torch.float64),
    )
    train_a_little(pool, x)
    layer.of_start_C = torch.zeros(())
    pool.values.grad.zero_()
    (layer(x) * weight).sum().backward()
    if settled:
        pool.settle_gradient()
    found = pool.gate_gradient_K()
    layer.gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(found, layer.gate.grad)


def test_the_budget_counts_what_is_saved():
    shapes = {"one": (64, 32), "two": (16, 16)}
    plain = plan_start(shapes, parse_budget(8), "auto")
    double = plan_start(shapes, parse_budget(8), "auto", RelativeLinear)
    assert (double.budget, double.average_rank) == (plain.budget, plain.average_rank)
    assert double.counts == {"one": 8, "two": 8}
    assert plan_start(shapes, parse_budget("auto"), "auto", RelativeLinear).counts == {"one": 16, "two": 8}
