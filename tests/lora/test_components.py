"""The rank-1 layer, the pool behind it, and the gauge: what must hold whatever the policy."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dynlora_cli.errors import DynloraError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.svd_basis import svd_basis, to_svd_basis

from toy import fill, make, train


def test_output_equals_base_at_start():
    net, _ = make()
    x = torch.randn(5, 12)
    expected = net.down.base(F.silu(net.gate.base(x)) * net.up.base(x))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_equals_base_plus_delta(kind):
    base = nn.Linear(6, 10) if kind == "linear" else Conv1D(10, 6)
    layer = ComponentLinear(base, scale=1.3)
    fill(Pool({"layer": layer}, {"layer": 3}))
    x = torch.randn(2, 7, 6)
    weight_OI = base.weight if kind == "linear" else base.weight.T
    delta = 1.3 * layer.b_OC.double() @ layer.a_CI.double()
    assert_close_to_truth(layer.delta_OI(), delta, terms=3 + 1)
    exact = x.double() @ (weight_OI.double() + delta).T + base.bias.double()
    assert_close_to_truth(layer(x), exact, terms=6 + 6 + 3)


def test_leaves_are_views_of_the_pool_and_so_are_gradients():
    net, pool = make()
    fill(pool)
    train_loss = net(torch.randn(4, 12)).square().sum()
    train_loss.backward()
    for layer, (a, b), (a_grad, b_grad) in zip(
        net.layers().values(), pool.views(pool.values), pool.views(pool.values.grad), strict=True
    ):
        assert layer.a_CI.data_ptr() == a.data_ptr()
        assert layer.b_OC.data_ptr() == b.data_ptr()
        assert layer.a_CI.grad.data_ptr() == a_grad.data_ptr()
        assert torch.equal(layer.b_OC.grad, b_grad)
    assert pool.values.grad.abs().min() > 0


def test_one_flat_adamw_equals_adamw_on_every_factor():
    net, pool = make(dtype=torch.float64)
    reference, reference_pool = make(dtype=torch.float64)
    flat = torch.optim.AdamW([pool.values], lr=1e-2, weight_decay=0.1)
    leaves = [p for layer in reference.layers().values() for p in (layer.a_CI, layer.b_OC)]
    separate = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.1)
    train(net, pool, flat, steps=5)
    train(reference, reference_pool, separate, steps=5)
    torch.testing.assert_close(pool.values, reference_pool.values)


def test_gate_gradient_is_the_derivative_of_the_gate():
    net, pool = make(dtype=torch.float64)
    fill(pool)
    x = torch.randn(9, 12, dtype=torch.float64)
    gates = {
        name: torch.ones(layer.count, dtype=torch.float64, requires_grad=True) for name, layer in net.layers().items()
    }
    for name, layer in net.layers().items():
        layer.gate = gates[name]
    net(x).square().sum().backward()
    expected = torch.cat([gate.grad for gate in gates.values()])
    torch.testing.assert_close(pool.gate_gradient_K(), expected)


def test_gate_of_ones_changes_nothing_and_zero_removes():
    net, pool = make(dtype=torch.float64)
    fill(pool)
    x = torch.randn(3, 12, dtype=torch.float64)
    plain = net(x)
    for layer in net.layers().values():
        layer.gate = torch.ones(layer.count, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain)  # not to the bit: with a gate it is not the fused function that computes
    for layer in net.layers().values():
        layer.gate = torch.zeros(layer.count, dtype=torch.float64)
    assert torch.equal(net(x), net.down.base(F.silu(net.gate.base(x)) * net.up.base(x)))


def test_layer_without_components_is_its_base():
    net, pool = make(counts=(0, 3, 0))
    fill(pool)
    x = torch.randn(3, 12, requires_grad=True)
    assert torch.equal(net.up(x), net.up.base(x))
    net(x).sum().backward()
    assert pool.parameters == 3 * 32


def test_dropout_only_while_training():
    net, pool = make(dropout=0.5)
    fill(pool)
    x = torch.randn(3, 12)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_bf16_input_keeps_its_type_and_components_stay_fp32():
    layer = ComponentLinear(nn.Linear(6, 10, dtype=torch.bfloat16), scale=1.0)
    pool = Pool({"layer": layer}, {"layer": 3})
    fill(pool)
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert pool.values.dtype == torch.float32
    exact = x.double() @ (layer.base.weight.double() + layer.delta_OI().double()).T + layer.base.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        for found in (layer(x), y):  # rounded are a, b, the product with a, the update, the base's output and the sum
            assert_close_to_truth(found, exact, terms=6)


def test_energy_is_the_frobenius_norm():
    net, pool = make(dtype=torch.float64)
    fill(pool)
    for layer in net.layers().values():
        assert layer.energy() == pytest.approx(layer.delta_OI().norm().item())


def test_swap_is_refused_while_a_graph_is_alive():
    net, pool = make()
    fill(pool)
    loss = net(torch.randn(2, 12)).sum()
    with pytest.raises(DynloraError, match="graph"):
        pool.adopt(pool.values.detach().clone(), pool.counts)
    loss.backward()
    del loss
    pool.adopt(pool.values.detach().clone(), pool.counts)
    with torch.no_grad():
        held = net(torch.randn(2, 12))
    pool.adopt(pool.values.detach().clone(), pool.counts)
    assert held.grad_fn is None


class TestGauge:
    def test_function_is_unchanged(self):
        net, pool = make(dtype=torch.float64)
        fill(pool)
        x = torch.randn(5, 12, dtype=torch.float64)
        before = net(x).detach()
        optimizer = torch.optim.AdamW([pool.values], lr=0.0)
        assert to_svd_basis(pool, optimizer) == 3
        torch.testing.assert_close(net(x), before)

    def test_components_are_the_singular_directions(self):
        net, pool = make(dtype=torch.float64)
        fill(pool)
        to_svd_basis(pool, torch.optim.AdamW([pool.values]))
        for layer in net.layers().values():
            sigma = torch.linalg.svdvals(layer.delta_OI())[: layer.count]
            norms = layer.scale * layer.a_CI.norm(dim=1) * layer.b_OC.norm(dim=0)
            torch.testing.assert_close(norms, sigma)
            gram = layer.a_CI @ layer.a_CI.T
            torch.testing.assert_close(gram, torch.diag(gram.diagonal()))

    def test_row_norms_of_a_keep_their_mean(self):
        net, pool = make(dtype=torch.float64)
        fill(pool)
        before = [layer.a_CI.norm(dim=1).mean().item() for layer in net.layers().values()]
        to_svd_basis(pool, torch.optim.AdamW([pool.values]))
        after = [layer.a_CI.norm(dim=1).mean().item() for layer in net.layers().values()]
        assert after == pytest.approx(before)

    def test_cutting_to_k_is_the_best_approximation(self):
        net, pool = make(counts=(6, 6, 4), dtype=torch.float64)
        fill(pool)
        dense = {name: layer.delta_OI() for name, layer in net.layers().items()}
        to_svd_basis(pool, torch.optim.AdamW([pool.values]))
        for name, layer in net.layers().items():
            k = layer.count // 2
            cut = layer.scale * layer.b_OC[:, :k] @ layer.a_CI[:k]
            u, s, vh = torch.linalg.svd(dense[name])
            best = u[:, :k] @ torch.diag(s[:k]) @ vh[:k]
            torch.testing.assert_close(cut, best)

    def test_first_moments_turn_as_gradients_do(self):
        """The gradient in the new basis equals the old gradient transported as a moment."""
        net, pool = make(dtype=torch.float64)
        fill(pool)
        x, y = torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
        optimizer = torch.optim.AdamW([pool.values])
        F.mse_loss(net(x), y).backward()
        optimizer.state[pool.values] = {
            "step": torch.tensor(1.0),
            "exp_avg": pool.values.grad.clone(),
            "exp_avg_sq": pool.values.grad.square(),
        }
        to_svd_basis(pool, optimizer)
        pool.values.grad.zero_()
        F.mse_loss(net(x), y).backward()
        torch.testing.assert_close(optimizer.state[pool.values]["exp_avg"], pool.values.grad)
        assert (optimizer.state[pool.values]["exp_avg_sq"] >= 0).all()

    def test_zero_b_is_left_alone(self):
        _, pool = make(dtype=torch.float64)
        before = pool.values.clone()
        assert to_svd_basis(pool, torch.optim.AdamW([pool.values])) == 0
        assert torch.equal(pool.values, before)

    def test_directions_without_size_keep_a_usable_a(self):
        a, b = torch.randn(4, 12), torch.zeros(20, 4)
        b[:, 0] = 1.0
        T, T_inv = svd_basis(a, b)
        torch.testing.assert_close(T @ T_inv, torch.eye(4, dtype=torch.float64))
        turned_a, turned_b = T @ a.double(), b.double() @ T_inv
        assert (turned_a.norm(dim=1) > 0.1).all()
        assert turned_b[:, 1:].abs().max() < 1e-9

    def test_dependent_rows_keep_their_basis(self):
        a = torch.randn(3, 12)
        a[2] = a[1]
        assert svd_basis(a, torch.randn(20, 3)) is None
