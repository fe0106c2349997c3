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
