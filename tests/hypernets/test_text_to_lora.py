"""Text-to-LoRA's network against the paper's formulas and the sizes of its authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.config.options import options, section
from dynlora_cli.hypernets.hypernet import Hypernet, places_of

WIDTH, RANK, LATENT, HIDDEN = 10, 3, 16, 24
SHAPES = {"self_attn.q_proj": (12, 8), "mlp.down_proj": (20, 12)}
LAYERS = [(f"model.layers.{n}.{module}", *shape, RANK) for n in range(3) for module, shape in SHAPES.items()]
# Numbers that train, counted in HyperModulator of SakanaAI/text-to-lora (commit 8ba7749) with a text vector of 1024, on
# Mistral-7B's 32 q_proj and v_proj at rank 8: as it is, with shared_AB_head, and with autoreg_gen and learnable_pos_emb
# as well. The paper has 55, 34 and 5 million.
AUTHORS = {"L": 55_317_504, "M": 34_346_752, "S": 4_987_904}
MISTRAL = [
    (f"model.layers.{n}.self_attn.{module}", 4096, d_out, 8)
    for n in range(32)
    for module, d_out in (("q_proj", 4096), ("v_proj", 1024))
]
HEADS = list(AUTHORS)


def net_of(
    head: str, layers: Any = LAYERS, *, width: int = WIDTH, scale: float = 2.0, seed: int = 0, **given: Any
) -> Hypernet:
    torch.manual_seed(seed)
    form = section(options("variants", "text-to-lora"))(**{"head": head, **given})
    net: Hypernet = plugins.load("hypernets", "text-to-lora").Net(places_of(layers), form, width, scale)
    return net


def small(head: str, **given: Any) -> Hypernet:
    return net_of(head, latent_size=LATENT, hidden_size=HIDDEN, **given).double().eval()


def stirred(head: str, **given: Any) -> Hypernet:
    """One whose every trained number is drawn anew, so that nothing is 0."""
    net = small(head, **given)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5)
    return net


def texts(count: int = 2) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def adapters(count: int, seed: int = 0) -> list[dict[str, tuple[Tensor, Tensor]]]:
    chance = torch.Generator().manual_seed(seed)
    return [
        {
            name: tuple(torch.randn(shape, generator=chance).double() for shape in ((rank, d_in), (d_out, rank)))
            for name, d_in, d_out, rank in LAYERS
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("head", HEADS)
def test_with_the_papers_sizes_it_has_as_many_parameters_as_the_authors_code(head: str):
    with torch.device("meta"):
        assert net_of(head, MISTRAL, width=1024).parameter_count == AUTHORS[head]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_has_as_many_numbers_as_the_formula_says(head: str):
    net = small(head)
    trunk = sum(p.numel() for p in net.trunk.parameters())
    outputs = {
        "L": [RANK * (d_in + d_out) for d_in, d_out in SHAPES.values()],
        "M": [RANK * max(shape) for shape in SHAPES.values()],
        "S": [max(shape) for shape in SHAPES.values()],
    }[head]
    vectors = {"L": 0, "M": 2 * len(SHAPES), "S": 2 * len(SHAPES) + RANK}[head]  # sides of modules, and components
    norms = {"L": 0, "M": 1, "S": 2}[head]
    assert net.parameter_count - trunk == HIDDEN * sum(outputs) + LATENT * (vectors + 2 * norms)


@pytest.mark.parametrize("head", HEADS)
def test_a_learned_offset_is_a_plain_lora_more(head: str):
    lora = sum(rank * (d_in + d_out) for _, d_in, d_out, rank in LAYERS)
    assert small(head, ab_offset="learned").parameter_count == small(head).parameter_count + lora


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("offset", ["fixed", "learned"])
def test_it_begins_as_a_plain_lora_whatever_the_text(head: str, offset: str):
    net = small(head, ab_offset=offset)
    for place, written in zip(net.places, net(texts()).values(), strict=True):
        assert (written.a.shape, written.b.shape) == ((2, RANK, place.d_in), (2, place.d_out, RANK))
        assert not written.b.any()
        assert torch.equal(written.a[0], written.a[1])
        limit = place.d_in**-0.5  # PEFT's kaiming_uniform_(a=sqrt 5)
        assert 0.8 * limit < written.a.abs().max() <= limit
    first, other = (net_of(head, seed=seed)(texts().float()) for seed in (0, 1))
    name = LAYERS[0][0]
    assert not torch.equal(first[name].a, other[name].a)


@pytest.mark.parametrize("head", HEADS)
def test_b_learns_from_the_first_step_on_and_a_after_it(head: str):
    net = small(head)
    name, x = LAYERS[0][0], torch.randn(12).double()

    def out() -> Tensor:
        written = net(texts())[name]
        return (written.b @ (written.a @ x)[..., None]).square().sum() + written.b.sum()

    out().backward()
    weight = net.heads[0].linear.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    net.zero_grad()
    out().backward()
    trained = {key for key, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"trunk.text.0.weight", "trunk.depth.0.weight", "trunk.module.0.weight"} <= trained
    assert ("sides.table.weight" in trained, "components.table.weight" in trained) == (head != "L", head == "S")


@pytest.mark.parametrize("head", HEADS)
def test_what_is_written_depends_on_text_depth_module_side_and_component(head: str):
    net = stirred(head)
    written = net(texts())
    first, deeper, other = (
        written[f"model.layers.{n}.{m}"]
        for n, m in ((0, "self_attn.q_proj"), (1, "self_attn.q_proj"), (0, "mlp.down_proj"))
    )
    a = net.heads[0].offset_a_MCI
    own, below = first.a - a[0], deeper.a - a[1]
    assert not torch.allclose(own[0], own[1])
    assert not torch.allclose(own, below)
    assert not torch.allclose(own[0, 0], own[0, 1])
    assert not torch.allclose(own[..., :8], first.b.mT / net.scale)
    assert not torch.allclose(own[0, 0, :4], (other.a - net.heads[1].offset_a_MCI[0])[0, 0, :4])
    alone = net(texts()[1:])
    for name, each in written.items():
        torch.testing.assert_close(each.a[1:], alone[name].a)
        torch.testing.assert_close(each.b[1:], alone[name].b)


@pytest.mark.parametrize("head", HEADS)
def test_the_scale_is_in_b(head: str):
    ones, twos = (stirred(head, scale=scale) for scale in (1.0, 2.0))
    twos.load_state_dict(ones.state_dict())
    name = LAYERS[1][0]
    one, two = ones(texts())[name], twos(texts())[name]
    torch.testing.assert_close(two.a, one.a)
    torch.testing.assert_close(two.b, 2 * one.b)


@pytest.mark.parametrize("head", HEADS)
def test_the_penalty_is_the_mean_squares_of_both_factors(head: str):
    net = stirred(head, written_penalty=0.5)
    written = net(texts())
    by_module = [[written[name] for name, *_ in LAYERS if name.endswith(module)] for module in SHAPES]
    squares = [
        torch.stack([w.a.square().mean() for w in own]).mean()
        + torch.stack([w.b.square().mean() / 4 for w in own]).mean()
        for own in by_module
    ]
    torch.testing.assert_close(net.penalty(written), 0.5 * torch.stack(squares).sum())
    silent = stirred(head, written_penalty=0.0)
    assert silent.penalty(silent(texts())) is None


@pytest.mark.parametrize("head", HEADS)
def test_on_adapters_it_begins_as_their_mean_and_a_z_score_is_their_spread(head: str):
    net, known = small(head), adapters(4)
    net.stand_on(known)
    for name, written in net(texts()).items():
        for side, made in enumerate((written.a, written.b)):
            wanted = torch.stack([adapter[name][side] for adapter in known])
            torch.testing.assert_close(made[0], wanted.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(net.spreads()[name][side].double(), wanted.std(0), rtol=1e-5, atol=1e-6)
    assert net.penalty(net(texts())) is None
    plain = stirred(head)
    moved = stirred(head)
    moved.stand_on(known)
    name = LAYERS[0][0]
    means = torch.stack([adapter[name][0] for adapter in known]).mean(0)
    z = plain(texts())[name].a - plain.heads[0].offset_a_MCI[0]
    torch.testing.assert_close(moved(texts())[name].a, means + z * net.spreads()[name][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_network_that_stands_on_adapters_is_read_again(head: str):
    net = stirred(head)
    net.stand_on(adapters(3))
    again = small(head, seed=5)
    again.make_room(net.state_dict().keys())
    again.load_state_dict(net.state_dict())
    for name, written in again(texts()).items():
        assert torch.equal(written.a, net(texts())[name].a)
        assert torch.equal(written.b, net(texts())[name].b)
