"""Routers against dense references in fp64: every adapter's update as a matrix of its own, every gate by its formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.adapters.side_by_side import apart
from dynlora_cli.config.options import options, section
from dynlora_cli.lora.multi import Choice
from dynlora_cli.lora.routers.gates import Gates
from dynlora_cli.lora.routers.mixed import MixedLinear

TERMS = 128  # sums over inputs, components and adapters, one after the other, and a softmax
RANKS = {0: 3, 2: 1, 3: 5}  # of a router's four adapters, by column; one has no components in the layer


@pytest.fixture
def layer() -> MixedLinear:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(12, 7)
    for parameter in base.parameters():
        parameter.data.uniform_(-1, 1, generator=generator)
    layer = MixedLinear(base, "block.q_proj", Choice())
    layer.hold(
        (column, torch.randn(rank, 12, generator=generator), torch.randn(7, rank, generator=generator))
        for column, rank in RANKS.items()
    )
    return layer.requires_grad_(False)


def router(method: str, layer: MixedLinear, **values: Any) -> Gates:
    """A router of four adapters over one layer, whose numbers are drawn at random."""
    form = section(options("variants", method)).model_validate(values)
    gates: Gates = plugins.load("variants", method).Gates({layer.name: layer}, list("abcd"), form, 12)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number in gates.parameters():
            number.copy_(torch.randn(number.shape, generator=generator))
    layer.choice.gates = gates
    return gates


def near(value: Tensor, truth: Tensor) -> None:
    assert_close_to_truth(value, truth, terms=TERMS)


def inputs() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


def dense(layer: MixedLinear, x: Tensor, gates: Mapping[int, Tensor]) -> Tensor:
    """W x + Σ g_e B_e A_e x, one adapter after the other; `gates` by the place of an adapter in the layer."""
    base: Any = layer.base
    y = F.linear(x, base.weight.double(), base.bias.double())
    for place, part in enumerate(layer.slices):
        y = y + gates[place][..., None] * (x @ layer.a_RI[part].double().T @ layer.b_OR[:, part].double().T)
    return y


def test_phatgoose_compares_the_input_with_the_vector_of_each_adapter(layer: MixedLinear) -> None:
    gates = router("phatgoose", layer, top_k=2)
    layer.eval()
    x, v = inputs().double(), gates.of(layer, "v_EI").detach().double()
    normed = [(t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for t in (x, v)]
    logits = normed[0] @ normed[1].T / 12**0.5
    shares = torch.zeros_like(logits)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        best = logits[tuple(at)].topk(2).indices
        shares[(*at, best)] = logits[(*at, best)].softmax(-1)
    near(layer(inputs()), dense(layer, x, dict(enumerate(shares.unbind(-1)))))


def test_phatgoose_trains_each_adapter_on_its_own_rows_alone(layer: MixedLinear) -> None:
    gates = router("phatgoose", layer)
    layer.train()
    gates.owner_B = torch.tensor([3, 1])  # the adapter in column 1 has no components here
    x, v = inputs().double(), gates.of(layer, "v_EI").detach().double()
    nothing = torch.zeros(2, 5, dtype=torch.float64)
    own = torch.stack([(x[0] @ v[2]).sigmoid(), nothing[1]])
    y = layer(inputs())
    near(y, dense(layer, x, {0: nothing, 1: nothing, 2: own}))
    y.square().sum().backward()
    gradient = gates.of(layer, "v_EI").grad
    assert gradient is not None
    assert gradient[:2].count_nonzero() == 0
    assert gradient[2].count_nonzero() == 12


def test_what_is_left_out_leaves_its_share_to_the_others(layer: MixedLinear) -> None:
    gates = router("phatgoose", layer, top_k=3)
    layer.eval()
    x_NI = inputs().flatten(0, 1)
    h_NR = F.linear(x_NI, layer.a_RI)
    all_NE = gates.gates(layer, x_NI, h_NR)
    gates.off = frozenset([2])
    without_NE = gates.gates(layer, x_NI, h_NR)
    assert without_NE[:, 1].count_nonzero() == 0
    near(without_NE[:, [0, 2]], (all_NE / (1 - all_NE[:, 1:2]))[:, [0, 2]].double())
    gates.off = frozenset([0, 2, 3])
    assert gates.gates(layer, x_NI, h_NR).count_nonzero() == 0


def test_numbers_are_saved_by_the_names_of_layers(layer: MixedLinear) -> None:
    gates, other = router("phatgoose", layer), router("phatgoose", layer)
    assert list(gates.tensors()) == ["block.q_proj.v_EI"]
    with torch.no_grad():
        for number in other.parameters():
            number.zero_()
    other.load(gates.tensors())
    torch.testing.assert_close(other.tensors(), gates.tensors(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"lacks block\.q_proj\.v_EI"):
        other.load({})
    with pytest.raises(ValueError, match=r"is \(3,\) there and \(3, 12\) here"):
        other.load({"block.q_proj.v_EI": torch.zeros(3)})


def updates(layer: MixedLinear, x: Tensor) -> list[Tensor]:
    """B_e A_e x of every adapter of the layer, dense."""
    return [x @ layer.a_RI[part].double().T @ layer.b_OR[:, part].double().T for part in layer.slices]


def mole_shares(gates: Gates, layer: MixedLinear, x: Tensor, without: tuple[int, ...] = ()) -> Tensor:
    """softmax(G u/‖u‖ / τ) with u in full, [tokens, E x O]."""
    u = torch.cat(updates(layer, x), -1)
    g = gates.of(layer, "gate_EEO").detach().double().flatten(1)
    logits = (u / u.norm(dim=-1, keepdim=True)) @ g.T / gates.of(layer, "log_temperature").detach().double().exp()
    logits[..., list(without)] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("without", [(), (1,)])
def test_mole_shares_by_what_all_adapters_would_say(layer: MixedLinear, without: tuple[int, ...]) -> None:
    gates = router("mole", layer)
    gates.off = frozenset(layer.adapters[place] for place in without)
    layer.eval()
    x = inputs().double()
    near(layer(inputs()), dense(layer, x, dict(enumerate(mole_shares(gates, layer, x, without).unbind(-1)))))


def test_mole_gates_of_one_layer_have_the_dense_gradient(layer: MixedLinear) -> None:
    gates = router("mole", layer, balance=0.0)
    layer.train()
    layer(inputs()).square().sum().backward()
    x, g = inputs().double(), gates.of(layer, "gate_EEO").detach().double().requires_grad_()
    parts = updates(layer, x)
    u = torch.cat(parts, -1)
    tau = gates.of(layer, "log_temperature").detach().double().exp()
    shares = ((u / u.norm(dim=-1, keepdim=True)) @ g.flatten(1).T / tau).softmax(-1)
    dense(layer, x, dict(enumerate(shares.unbind(-1)))).square().sum().backward()
    found, truth = gates.of(layer, "gate_EEO").grad, g.grad
    assert found is not None
    assert truth is not None
    assert_close_to_truth(found, truth, terms=8 * TERMS)


def test_mole_balances_the_mean_shares_and_forgets_them_with_the_step(layer: MixedLinear) -> None:
    gates = router("mole", layer, balance=0.5)
    layer.train()
    for part in inputs():
        layer(part[None])
    x = inputs().double()
    means = mole_shares(gates, layer, x).mean((0, 1))
    penalty = gates.penalty()
    assert penalty is not None
    near(penalty, -0.5 * means.log().sum())
    penalty.backward()
    assert gates.of(layer, "gate_EEO").grad is not None
    assert gates.penalty() is None


def test_mole_begins_with_all_alike(layer: MixedLinear) -> None:
    gates = router("mole", layer)
    gates.load({name: value * 0 for name, value in gates.tensors().items()})
    layer.eval()
    third = torch.full((2, 5), 1 / 3, dtype=torch.float64)
    near(layer(inputs()), dense(layer, inputs().double(), dict.fromkeys(range(3), third)))


@pytest.mark.parametrize("sparse", [False, True])
def test_moa_weighs_each_adapter_for_itself(layer: MixedLinear, sparse: bool) -> None:
    gates = router("moa", layer, sparse=sparse, threshold_max=0.9)
    layer.eval()
    x = inputs().double()
    weight, bias = (gates.of(layer, name).detach().double() for name in ("weight_EI", "bias_E"))
    sigmoids = (x @ weight.T + bias).sigmoid()
    weights = sigmoids[..., :3]
    if sparse:
        threshold = 0.9 * sigmoids[..., 3:]
        assert 0 < (weights < threshold).sum() < weights.numel()
        weights = torch.where(weights < threshold, 0.0, weights)
    near(layer(inputs()), dense(layer, x, dict(enumerate(weights.unbind(-1)))))


def test_a_threshold_of_moa_learns(layer: MixedLinear) -> None:
    gates = router("moa", layer, sparse=True)
    layer.train()
    layer(inputs()).square().sum().backward()
    gradient = gates.of(layer, "weight_EI").grad
    assert gradient is not None
    assert gradient[3].count_nonzero() == 12


def test_moa_adds_what_a_layer_of_another_kind_returns_above_the_base(layer: MixedLinear) -> None:
    base: Any = layer.base
    a, b = torch.randn(2, 12), torch.randn(7, 2)
    kinds = {
        "dora": Factors(a, b, kind="dora", own={"magnitude_O": torch.rand(7) + 0.5}),
        "hira": Factors(a, b, kind="hira"),
    }
    layer.add([1, 4], [apart(base, factors) for factors in kinds.values()])
    gates = router("moa", layer)
    layer.eval()
    x = inputs().double()
    W = base.weight.double()
    turned = W + (b @ a).double()
    changed = [
        turned * (kinds["dora"].own["magnitude_O"].double() / turned.norm(dim=1))[:, None],
        W + W * (b @ a).double(),
    ]
    sigmoids = (
        x @ gates.of(layer, "weight_EI").detach().double().T + gates.of(layer, "bias_E").detach().double()
    ).sigmoid()
    truth = dense(layer, x, dict(enumerate(sigmoids.unbind(-1))))
    for place, other in enumerate(changed):
        truth = truth + sigmoids[..., 3 + place, None] * (x @ (other - W).T)
    near(layer(inputs()), truth)
    layer(inputs()).square().sum().backward()
    assert all(number.grad is not None for number in gates.parameters())
    assert all(parameter.grad is None for parameter in layer.base.parameters())


@pytest.mark.parametrize("method", ["phatgoose", "mole", "moa"])
def test_tokens_that_need_different_adapters_find_them(layer: MixedLinear, method: str) -> None:
    """Tokens of three kinds, each of which needs one adapter in full: better than the best share of all alike."""
    gates = router(method, layer)
    gates.load({name: value * 0 for name, value in gates.tensors().items()})
    generator = torch.Generator().manual_seed(5)
    centres = 2 * torch.randn(3, 12, generator=generator)
    kind = torch.arange(3).repeat(40)
    x = (centres[kind] + 0.3 * torch.randn(120, 12, generator=generator))[:, None]
    own = torch.stack(updates(layer, x.double())).float()[kind, torch.arange(120)]
    target = layer.base(x) + own
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
    layer.train()
    gates.owner_B = torch.tensor(layer.adapters)[kind] if method == "phatgoose" else None
    for _ in range(100):
        loss = (layer(x) - target).square().mean()
        penalty = gates.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    gates.owner_B = None
    alike = torch.stack(updates(layer, x.double())).float().sum(0)
    best = (alike * own).sum() / alike.square().sum()  # the share of all alike that comes nearest
    error = (layer(x) - target).square().mean()
    assert error < 0.5 * (best * alike - own).square().mean()
