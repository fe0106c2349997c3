"""What single variants add to a training step: thresholds, penalties, orders."""

from __future__ import annotations

import pytest
import torch
from test_variants import fill, one_layer

from dynlora_cli import plugins


def test_soras_threshold_draws_gates_to_zero_and_no_further(tmp_path):
    _, pool = one_layer(tmp_path, "sora", dtype=torch.float32)
    layer = pool.layers["layer"]
    with torch.no_grad():
        layer.a_CI[:, -1] = torch.tensor([1.0, 0.004, -0.5, 0.0])
    layer.threshold = 0.5
    layer.after_update(0.01)
    torch.testing.assert_close(layer.a_CI[:, -1].detach(), torch.tensor([0.995, 0.0, -0.495, 0.0]))


def test_adaloras_penalty_is_the_distance_from_orthonormal(tmp_path):
    _, pool = one_layer(tmp_path, "adalora")
    layer = pool.layers["layer"]
    q = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q
    with torch.no_grad():
        layer.a_CI[:, :-1] = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q.T
        layer.b_OC.copy_(q)
    layer.penalty_weight = 2.0
    assert layer.penalty().item() == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        layer.b_OC.mul_(2)  # PᵀP = 4, whose distance from 1 is 3 √4
    assert layer.penalty().item() == pytest.approx(2.0 * 3 * 2)
    layer.penalty_weight = 0.0
    assert layer.penalty() is None


def test_adaloras_gate_gradient_is_without_the_penalty(tmp_path):
    _, pool = one_layer(tmp_path, "adalora")
    fill(pool)
    layer, x = pool.layers["layer"], torch.randn(3, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    alone = pool.gate_gradient_K()
    layer.penalty_weight = 1.0
    pool.penalty().backward()
    torch.testing.assert_close(pool.gate_gradient_K(), alone)


def test_ards_penalty_draws_the_rank_factor_down_and_keeps_it_calm(tmp_path):
    _, pool = one_layer(tmp_path, "ard", dtype=torch.float32)
    layer, calm = pool.layers["layer"], plugins.load("variants", "ard").CALM
    layer.penalty_weight = 3.0
    layer.begin_step(1, 10)
    with torch.no_grad():
        layer.rank_factor.fill_(0.5)
    assert layer.penalty().item() == pytest.approx(3.0 * (0.5 + calm * 0.5))
    layer.penalty().backward()
    assert layer.rank_factor.grad.item() == pytest.approx(3.0 * (1 - calm))
    assert layer.gates_C().diff().max() < 0, "the last components close first"


def test_dyloras_components_go_from_the_end(tmp_path):
    _, pool = one_layer(tmp_path, "dylora")
    ranked = pool.layers["layer"].ranked(torch.tensor([1.0, 3.0, 0.5, 2.0]))
    assert ranked.tolist() == [3.0, 3.0, 2.0, 2.0]


def test_dylora_uses_first_components_in_a_step_and_all_after_it(tmp_path):
    _, pool = one_layer(tmp_path, "dylora", count=8, d_in=20, d_out=20)
    layer, counts = pool.layers["layer"], set()
    for step in range(1, 30):
        layer.begin_step(step, 30)
        layer.b_OC.data.fill_(1.0)
        used = layer.factors()[1].detach()[0]
        assert used.tolist() == sorted(used.tolist(), reverse=True)
        counts.add(int(used.sum()))
    assert counts == set(range(1, 9))
    layer.after_update(0.1)
    assert int(layer.factors()[1].detach()[0].sum()) == 8


def test_singlora_has_left_the_base_after_its_first_step(tmp_path):
    model, pool = one_layer(tmp_path, "singlora")
    pool.layers["layer"].begin_step(1, 100)
    x = torch.randn(3, 10, dtype=torch.float64)
    change = (model["layer"](x) - pool.layers["layer"].base(x)).norm()
    pool.layers["layer"].begin_step(100, 100)
    assert 0 < change < 0.2 * (model["layer"](x) - pool.layers["layer"].base(x)).norm()
