"""A hypernetwork is two new files: the tutorial's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypernet_runs import hypernet_recipe
from tiny_run import train
from tutorials import code_of

from dynlora_cli import plugins
from dynlora_cli.commands.adapt_by_hypernet import Request
from dynlora_cli.commands.adapt_by_hypernet import run as adapt
from dynlora_cli.config.options import options, section
from dynlora_cli.hypernets.files import read_hypernet
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


@pytest.mark.slow
def test_it_trains_and_writes_adapters(plug_in: Any, tmp_path: Path):
    add(plug_in)
    summary, _ = train(hypernet_recipe(tmp_path, adapter={"variant": "straight", "reach": 0.5}))
    assert summary["loss_after"] < summary["loss_before"]
    assert read_hypernet(tmp_path / "out").form.options == {"reach": 0.5}
    texts = {
        out: adapt(Request(tmp_path / "out", tmp_path / out, text)) for out, text in (("a", "ones"), ("b", "twos"))
    }
    assert texts["a"]["peft_check"]["problem"] is None
    one, other = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in texts)
    assert one != other
