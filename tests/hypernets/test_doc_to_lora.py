"""The network of Doc-to-LoRA against its authors' code, and what it makes of several chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynlora_cli import plugins
from dynlora_cli.config.options import options, section
from dynlora_cli.hypernets.documents import Activations
from dynlora_cli.hypernets.hypernet import Hypernet, places_of

PAPER = {"latent_size": 512, "blocks": 9, "heads": 16, "kv_heads": 4, "head_size": 128}
SMALL = {"latent_size": 16, "latents": 3, "heads": 4, "kv_heads": 2, "head_size": 8}
WIDTH, RANK, SCALE = 10, 3, 2.0


def make(shapes: dict[str, tuple[int, int]], layers: int, rank: int, width: int, **keys: Any) -> Hypernet:
    places = places_of(
        [(f"model.layers.{n}.mlp.{name}", *s, rank) for n in range(layers) for name, s in shapes.items()]
    )
    form: Any = section(options("variants", "doc-to-lora"))(**keys)
    net: Hypernet = plugins.load("hypernets", "doc-to-lora").Net(places, form, width, SCALE)
    return net


def small(**keys: Any) -> Hypernet:
    """A network all of whose numbers say something."""
    torch.manual_seed(0)
    net = make({"down_proj": (12, 10), "up_proj": (10, 12)}, 2, RANK, WIDTH, **SMALL | keys).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5)
    return net


def activations(*chunks: int, seed: int = 0) -> Activations:
    """Random ones of documents of so many chunks, each of another length."""
    torch.manual_seed(seed)
    lengths = torch.tensor([3 + number % 4 for number in range(sum(chunks))])
    mask_NT = torch.arange(6) < lengths[:, None]
    return Activations(torch.randn(len(lengths), 2, 6, WIDTH).double() * mask_NT[:, None, :, None], mask_NT, chunks)


def part(whole: Activations, *numbers: int) -> Activations:
    return Activations(whole.inputs_NLTD[list(numbers)], whole.mask_NT[list(numbers)], (len(numbers),))


@pytest.mark.parametrize(
    ("shapes", "layers", "rank", "width", "keys", "count"),
    [
        # gemma-2-2b with the settings of the authors' scripts/main_exp/1-train.sh, and SmolLM2-135M with the same
        ({"down_proj": (9216, 2304)}, 26, 8, 2304, PAPER, 315_237_792),
        ({"down_proj": (1536, 576)}, 30, 8, 576, PAPER, 157_481_440),
        # two modules, of a model as small as stories3M
        (
            {"down_proj": (512, 192), "gate_proj": (192, 512)},
            *(6, 4, 192),
            PAPER | {"latent_size": 64, "blocks": 3, "mlps": 2},
            2_825_952,
        ),
    ],
)
def test_it_has_as_many_parameters_as_the_authors_network(shapes, layers, rank, width, keys, count):
    """Counted in SakanaAI/doc-to-lora's own HyperLoRA, with the same sizes (per-layer activations, per-rank output)."""
    with torch.device("meta"):
        net = make(shapes, layers, rank, width, **keys)
    assert net.parameter_count == count


def test_it_begins_with_no_update_and_factors_that_depend_on_the_document():
    torch.manual_seed(0)
    net = make({"down_proj": (12, 10)}, 2, RANK, WIDTH, **SMALL).double()
    for written in net(activations(1, 1)).values():
        assert written.a.shape == (2, 2 * RANK, 12)
        assert not written.b.any()
        torch.testing.assert_close(written.a[0, :RANK], written.a[1, :RANK])
        assert not torch.allclose(written.a[0, RANK:], written.a[1, RANK:])


def test_the_update_of_a_document_is_the_sum_over_its_chunks_and_what_all_have():
    net, document = small(), activations(3)
    nothing = net(Activations(torch.zeros(0, 2, 0, WIDTH).double(), torch.zeros(0, 0, dtype=torch.bool), (0,)))
    together, alone = net(document), [net(part(document, number)) for number in range(3)]
    for name, written in together.items():
        assert written.a.shape[1] == 4 * RANK
        assert nothing[name].a.shape[1] == RANK
        common = nothing[name].b @ nothing[name].a
        assert common.any()
        expected = common + sum(other[name].b @ other[name].a - common for other in alone)
        torch.testing.assert_close(written.b @ written.a, expected)


def test_documents_of_a_batch_do_not_see_each_other():
    net, documents = small(), activations(2, 1, 3)
    together = net(documents)
    for place, numbers in enumerate([(0, 1), (2,), (3, 4, 5)]):
        for name, alone in net(part(documents, *numbers)).items():
            both = together[name]
            torch.testing.assert_close(both.b[place] @ both.a[place], (alone.b @ alone.a)[0])


def test_padding_and_the_size_of_a_blocks_inputs_say_nothing():
    net, document = small(), activations(1)
    shorter = Activations(document.inputs_NLTD[:, :, :3], document.mask_NT[:, :3], (1,))
    louder = document._replace(inputs_NLTD=document.inputs_NLTD * torch.tensor([1.0, 100.0])[:, None, None])
    noisy = document._replace(inputs_NLTD=document.inputs_NLTD + 5.0 * ~document.mask_NT[:, None, :, None])
    for name, written in net(document).items():
        for other in (shorter, louder, noisy):
            torch.testing.assert_close(net(other)[name].a, written.a, rtol=1e-5, atol=1e-5)


def test_each_block_has_its_own_inputs():
    net, document = small(), activations(1)
    other = document.inputs_NLTD.clone()
    other[:, 1] = torch.randn(6, WIDTH)
    before, after = net(document), net(document._replace(inputs_NLTD=other))
    for name in before:
        assert torch.allclose(before[name].a, after[name].a) == (".0." in name)


def test_the_penalty_is_the_mean_size_of_what_was_written_for_chunks():
    net, documents = small(l1=0.5), activations(1, 2)
    common = RANK
    sizes = []
    for written in net(documents).values():
        a, b = written.a[:, common:], written.b[:, :, common:] / (SCALE * RANK**1.5)
        a_chunks, b_chunks = (a[0, :RANK], a[1, :RANK], a[1, RANK:]), (b[0, :, :RANK], b[1, :, :RANK], b[1, :, RANK:])
        sizes.append(sum(x.abs().mean() for x in (*a_chunks, *b_chunks)) / 2)
    torch.testing.assert_close(net.penalty(net(documents)), 0.5 * torch.stack(sizes).mean())
    assert small().penalty(small()(documents)) is None


def test_gradients_reach_every_number():
    net = small()
    sum((w.b @ w.a).square().sum() for w in net(activations(1, 2)).values()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
