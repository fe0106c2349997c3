"""A hypernetwork is two new files: the tutorial's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tutorials import code_of

from dynlora_cli import plugins
from dynlora_cli.config.options import options, section
from dynlora_cli.hypernets.hypernet import places_of

LAYERS = [("model.layers.0.q", 6, 4, 2), ("model.layers.1.q", 6, 4, 2)]


def add(plug_in: Any) -> None:
    """The tutorial's two files."""
    for path, code in code_of("hypernets").items():
        plug_in("variants" if "/variants/" in path else "hypernets", Path(path).stem, code)


def test_it_writes_by_its_own_key(plug_in: Any):
    add(plug_in)
    kind = plugins.load("hypernets", "straight")
    assert (plugins.declared("hypernets", "straight", "READS"), kind.READS) == ("description", "description")
    form = section(options("variants", "straight"))
    vectors_BD, nets = torch.randn(3, 5), {}
    for reach in (0.5, 1.0):
        torch.manual_seed(0)
        nets[reach] = kind.Net(places_of(LAYERS), form(reach=reach), 5, 2.0)(vectors_BD)["model.layers.1.q"]
    assert [tuple(part.shape) for part in nets[0.5]] == [(2, 6), (4, 2), (3, 2)]
    torch.testing.assert_close(nets[1.0].gate - 2.0, 2 * (nets[0.5].gate - 2.0))
