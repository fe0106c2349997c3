"""The trunk of Text-to-LoRA: where numbers are dropped while it trains, and the names in its files."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from dynlora_cli.hypernets.hypernet import places_of
from dynlora_cli.hypernets.trunk import Trunk

PLACES = places_of([(f"model.layers.{n}.mlp.up_proj", 6, 4, 2) for n in range(3)])
# Dropouts of HyperModulator in SakanaAI/text-to-lora (commit 8ba7749), all of 0.05: mixer (before, inside, behind),
# mlp1 and mlp2 (inside, behind), mlp3 (inside).
AUTHORS = {"mixer": 3, "block1": 2, "block2": 2, "out": 1}


def trunk_of(dropout: float = 0.05) -> Trunk:
    torch.manual_seed(0)
    return Trunk(PLACES, 5, latent=16, hidden=24, dropout=dropout)


def test_numbers_are_dropped_where_the_authors_drop_them():
    trunk, dropped = trunk_of(), []
    for module in trunk.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.05
            module.register_forward_hook(lambda _, given, out: dropped.append(given[0].shape[-1]))
    trunk.train()(torch.randn(2, 5))
    assert Counter(dropped) == {16: 1 + 1 + 1 + 1, 24: 1 + 1 + 1 + 1}, (
        "widths: latent outside of the parts, hidden inside"
    )
    assert len(dropped) == sum(AUTHORS.values())


def test_each_part_drops_by_itself():
    """Every number is dropped, so a part gives what its last bias alone makes, or what stands beside it."""
    trunk, latent = trunk_of(dropout=1.0).train(), torch.randn(2, 3, 16)
    assert not trunk.mixer(latent).any()
    assert torch.equal(trunk.block1(latent), latent)
    assert torch.equal(trunk.block2(latent), latent)
    alone = trunk.out[4](trunk.out[3].bias)
    assert torch.allclose(trunk.out(latent), alone.expand(2, 3, -1))
    first = trunk.first(torch.randn(2, 5))
    assert not first.any(), "behind a mixer of which nothing is left"


def test_nothing_is_dropped_where_it_writes():
    trunk, text = trunk_of().eval(), torch.randn(2, 5)
    assert torch.equal(trunk(text), trunk_of(dropout=0.0).train()(text))


def test_names_in_files_are_those_of_networks_that_were_trained_before():
    linear = {name for name, tensor in trunk_of().state_dict().items() if tensor.ndim == 2 and "weight" in name}
    assert linear == {
        *(f"{part}.0.weight" for part in ("text", "depth", "module", "mixer")),
        "mixer.3.weight",
        *(f"block{n}.inner.{at}.weight" for n in (1, 2) for at in (1, 3)),
        *(f"out.{at}.weight" for at in (1, 3)),
    }
