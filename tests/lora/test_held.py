"""Numbers that do not train: which they are, that they stay, and what a layer with magnitudes computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.magnitudes import MagnitudeLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.svd_basis import to_svd_basis

from toy import SHAPES, fill
from toy import make as toy


class Net(nn.Module):
    """Two layers of a kind, in fp64."""

    def __init__(self, kind: type[ComponentLinear]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = kind(nn.Linear(9, 7).requires_grad_(False), 2.0)
        self.two = kind(nn.Linear(7, 5).requires_grad_(False), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def held(kind: type[ComponentLinear] = ComponentLinear) -> tuple[Net, Pool]:
    """2 old components of 4 in the first layer, none of 3 in the second; all with values."""
    net = Net(kind)
    pool = Pool({"one": net.one, "two": net.two}, {"one": 4, "two": 3}, seed=1)
    net.double()
    pool.adopt(pool.values.detach().double(), pool.counts)
    with torch.no_grad():
        for layer in pool.layers.values():
            layer.b_OC.copy_(torch.randn(layer.b_OC.shape, generator=torch.Generator().manual_seed(2)))
    net.one.born_at_start, net.two.born_at_start = (2, 2), (0, 3)
    pool.holds_old = True
    return net, pool


def steps(net: Net, pool: Pool, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    """As training does them: the gradient of what is held is let go, and the optimizer decays weights."""
    x = torch.randn(16, 9, generator=torch.Generator().manual_seed(3)).double()
    for _ in range(count):
        F.mse_loss(net(x), x[:, :5]).backward()
        assert pool.values.grad is not None
        assert pool.values.grad[pool.held_P].any(), "held numbers are scored by their gradient"
        assert pool.let_go()
        assert not pool.values.grad[pool.held_P].any()
        with pool.rates_of_a_and_b(4.0):
            optimizer.step()
        pool.zero_grad(optimizer)


def adamw(pool: Pool) -> torch.optim.Optimizer:
    return torch.optim.AdamW([pool.values], lr=0.05, weight_decay=0.5)


def test_held_numbers_stay_to_the_bit() -> None:
    net, pool = held()
    before = pool.values.detach().clone()
    optimizer = adamw(pool)
    steps(net, pool, optimizer)
    assert pool.held_P is not None
    assert int(pool.held_P.sum()) == 2 * (9 + 7)
    changed = before != pool.values.detach()
    assert torch.equal(changed, ~pool.held_P)
    assert not optimizer.state[pool.values]["exp_avg"][pool.held_P].any()


def test_what_is_held_follows_the_components_that_are_left() -> None:
    net, pool = held()
    optimizer = adamw(pool)
    steps(net, pool, optimizer)
    kept = net.one.a_CI[1].detach().clone()
    shrink(pool, optimizer, torch.tensor([False, True, True, False, True, False, True]))
    assert (net.one.born, net.two.born) == ((1, 1), (0, 2))
    assert pool.held_P is not None
    assert int(pool.held_P.sum()) == 9 + 7
    steps(net, pool, optimizer)
    assert torch.equal(net.one.a_CI[0], kept)


def test_the_gauge_leaves_what_is_held_and_turns_the_others() -> None:
    for kind in (ComponentLinear, MagnitudeLinear):
        net, pool = held(kind)
        before = [factor.detach().clone() for factor in net.one.factors()]
        sums = [layer.delta_OI() for layer in pool.layers.values()]
        assert to_svd_basis(pool, adamw(pool)) == 2
        a, b = (factor.detach() for factor in net.one.factors())
        assert torch.equal(a[:2], before[0][:2])
        assert torch.equal(b[:, :2], before[1][:, :2])
        assert not torch.equal(a[2:], before[0][2:])
        for layer, delta in zip(pool.layers.values(), sums, strict=True):
            assert torch.allclose(layer.delta_OI(), delta, atol=1e-12)


def test_each_birth_is_turned_by_itself_with_its_moments() -> None:
    net, pool = toy(dtype=torch.float64)
    fill(pool)
    layer = net.up
    layer.born_at_start = (2, 2)
    optimizer = torch.optim.AdamW([pool.values], lr=0.01)
    pool.values.grad = torch.randn(pool.parameters, generator=torch.Generator().manual_seed(4)).double()
    optimizer.step()
    halves = [layer.b_OC[:, part] @ layer.a_CI[part] for part in (slice(2), slice(2, 4))]
    first = pool.views(optimizer.state[pool.values]["exp_avg"])[0][0]
    norm = (first[:2] * layer.a_CI[:2]).sum()  # <m, A> of a birth, which no turn within it changes
    assert to_svd_basis(pool, optimizer) == len(SHAPES)
    for part, half in zip((slice(2), slice(2, 4)), halves, strict=True):
        assert torch.allclose(layer.b_OC[:, part] @ layer.a_CI[part], half, atol=1e-12)
        gram = layer.a_CI[part] @ layer.a_CI[part].T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(2).double(), atol=1e-12)
    first = pool.views(optimizer.state[pool.values]["exp_avg"])[0][0]
    assert torch.allclose((first[:2] * layer.a_CI[:2]).sum(), norm, atol=1e-12)


def test_of_old_components_the_magnitude_trains_and_of_new_ones_all_else() -> None:
    net, pool = held(MagnitudeLinear)
    before = pool.values.detach().clone()
    plain = Net(ComponentLinear).double()
    same = Pool({"one": plain.one, "two": plain.two}, pool.counts)
    plain.double()
    same.adopt(same.values.detach().double(), same.counts)
    with torch.no_grad():
        for layer, other in zip(pool.layers.values(), same.layers.values(), strict=True):
            other.a_CI.copy_(layer.a_CI[:, :-1])
            other.b_OC.copy_(layer.b_OC)
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(5)).double()
    assert torch.equal(net(x), plain(x)), "at the start all magnitudes are 1"
    steps(net, pool, adamw(pool))
    moved = pool.views(before != pool.values.detach())
    (a, b), (a_two, b_two) = moved
    assert a[:2, -1].all()
    assert not a[:2, :-1].any()
    assert not b[:, :2].any()
    assert a[2:, :-1].all()
    assert b[:, 2:].all()
    assert not a[2:, -1].any()
    assert a_two[:, :-1].all()
    assert b_two.all()
    assert not a_two[:, -1].any()
