"""Text-gated hypernetworks against Zhyper's formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynlora_cli import plugins
from dynlora_cli.config.options import options, section
from dynlora_cli.hypernets.hypernet import Hypernet, Place, places_of

WIDTH, RANK, LATENT, HIDDEN = 10, 3, 16, 24
SHAPES = {"self_attn.q_proj": (12, 8), "mlp.down_proj": (20, 12)}
LAYERS = [(f"model.layers.{n}.{module}", *shape, RANK) for n in range(4) for module, shape in SHAPES.items()]


def net_of(scale: float = 2.0) -> Hypernet:
    torch.manual_seed(0)
    form: Any = section(options("variants", "text-gated"))(latent_size=LATENT, hidden_size=HIDDEN)
    net: Hypernet = plugins.load("hypernets", "text-gated").Net(places_of(LAYERS), form, WIDTH, scale).double().eval()
    return net


def stirred(net: Hypernet) -> Hypernet:
    """The same with every number drawn anew, so that nothing is 0."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5)
    return net


def test_the_parameters_are_those_of_the_paper():
    pool = sum(RANK * (d_in + d_out) for _, d_in, d_out, _ in LAYERS)
    half, quarter = LATENT // 2, LATENT // 4

    def linear(d_in: int, d_out: int) -> int:
        return d_in * d_out + d_out

    inputs = linear(WIDTH, half) + 2 * half + (4 + 2) * quarter + 2 * 2 * quarter
    block = linear(LATENT, HIDDEN) + linear(HIDDEN, LATENT)
    out = 2 * LATENT + linear(LATENT, HIDDEN) + linear(HIDDEN, HIDDEN)
    trunk = inputs + block + 2 * (2 * LATENT + block) + out
    heads = len(SHAPES) * HIDDEN * RANK
    assert net_of().parameter_count == pool + trunk + heads


def test_it_begins_as_the_plain_lora_whatever_the_text():
    for place, written in zip(net_of().places, net_of()(torch.randn(2, WIDTH).double()).values(), strict=True):
        assert (written.a.shape, written.b.shape) == ((RANK, place.d_in), (place.d_out, RANK))
        assert not written.b.any()
        assert written.a.any()
        torch.testing.assert_close(written.gate, torch.full((2, RANK), 2.0).double())


def test_a_gate_depends_on_text_depth_and_module_and_is_written_by_the_modules_head():
    net, vectors_BD = stirred(net_of()), torch.randn(2, WIDTH).double()
    gates = {name: written.gate for name, written in net(vectors_BD).items()}
    first = gates["model.layers.0.mlp.down_proj"]
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, gates["model.layers.1.mlp.down_proj"])
    assert not torch.allclose(first, gates["model.layers.0.self_attn.q_proj"])
    assert set(gates) == {name for name, *_ in LAYERS}
    with torch.no_grad():
        net.heads[1].weight.zero_()  # of down_proj
    changed = net(vectors_BD)
    torch.testing.assert_close(changed["model.layers.0.mlp.down_proj"].gate, torch.full((2, RANK), 2.0).double())
    torch.testing.assert_close(
        changed["model.layers.0.self_attn.q_proj"].gate, gates["model.layers.0.self_attn.q_proj"]
    )


def test_texts_do_not_see_each_other():
    net, vectors_BD = stirred(net_of()), torch.randn(3, WIDTH).double()
    together, alone = net(vectors_BD), net(vectors_BD[1:2])
    for name, written in together.items():
        torch.testing.assert_close(written.gate[1:2], alone[name].gate)


@pytest.mark.parametrize(
    ("name", "depth", "module"),
    [
        ("model.layers.11.mlp.up_proj", 11, "mlp.up_proj"),
        ("transformer.h.3.attn.c_proj", 3, "attn.c_proj"),
        ("lm_head", 0, "lm_head"),
        ("model.layers.2.mlp.experts.7.up", 2, "mlp.experts.7.up"),
    ],
)
def test_places_know_their_block(name: str, depth: int, module: str):
    assert places_of([(name, 4, 6, 2)]) == [Place(name, 4, 6, 2, depth, module)]


def test_places_of_one_module_have_one_shape():
    places = places_of([("h.0.up", 4, 6, 2), ("h.1.up", 4, 8, 2), ("h.0.down", 6, 4, 2), ("h.1.down", 6, 4, 2)])
    assert [place.module for place in places] == ["up 4x6", "up 4x8", "down", "down"]
