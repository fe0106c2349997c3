"""An exporter with an option of its own is one new file: the tutorial's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from peft_adapters import make
from safetensors.torch import load
from tutorials import code_of

from dynlora_cli.adapters.read import read_adapter


@pytest.fixture
def adapter(tmp_path: Path, plug_in: Callable[..., Path]) -> Path:
    """An adapter; the tutorial's exporter is there."""
    (code,) = code_of("exporters").values()
    plug_in("exporters", "gzipped", code)
    return make("lora", tmp_path)[1]


def test_it_writes_with_its_option_and_is_checked(adapter: Path, tmp_path: Path, dynlora: Dynlora):
    sizes = {}
    for level in (None, 0, 9):
        out = tmp_path / f"packed-{level}"
        given = () if level is None else ("--set", f"level={level}")
        answer = dynlora("export", "--adapter", adapter, "--to", "gzipped", *given, "--out", out, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["check"]["kl"] == pytest.approx(0, abs=1e-9)
        assert json.loads((out / "export.json").read_text())["options"] == {"level": 6 if level is None else level}
        sizes[level] = answer.json["packed_bytes"]
    assert sizes[9] <= sizes[None] < sizes[0]
    tensors = load(gzip.decompress((tmp_path / "packed-9" / "adapter.gz").read_bytes()))
    for name, factors in read_adapter(adapter).layers.items():
        torch.testing.assert_close(tensors[f"{name}.b"] @ tensors[f"{name}.a"], factors.delta_OI(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gzipped", "--set", "levl=3"), "did you mean 'level'"),
        (("gzipped", "--set", "level=10"), "got 10, must be"),
        (("gzipped", "--set", "level=fast"), "must be"),
        (("gzipped", "--set", "level=2.5"), "must be"),
        (("peft", "--set", "level=3"), "exporter peft has no option 'level'"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: tuple[str, ...], words: str, adapter: Path, tmp_path: Path, dynlora: Dynlora
):
    answer = dynlora("export", "--adapter", adapter, "--out", tmp_path / "out", "--to", *arguments)
    assert (answer.code, words in " ".join(answer.err.split())) == (2, True), answer.err
    assert not (tmp_path / "out").exists()
