"""Which update a component came from is shown: `dynlora inspect`, the report and the model card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from tiny_run import make_recipe, train

from dynlora_cli.adapters.read import read_adapter


def test_ranks_by_birth_and_the_lineage(tmp_path: Path, dynlora: Dynlora) -> None:
    train(make_recipe(tmp_path, out="v1"))
    train(make_recipe(tmp_path, f"adapter.from={tmp_path / 'v1'}", "adapter.old=freeze", out="v2"))
    answer = dynlora("inspect", "--adapter", tmp_path / "v2", "--json")
    assert answer.code == 0, answer.err
    (told,) = answer.json["adapters"]
    adapter = read_adapter(tmp_path / "v2")
    assert [birth["name"] for birth in told["births"]] == ["v1", "v2"]
    assert sum(birth["components"] for birth in told["births"]) == told["components"]
    assert sum(birth["parameters"] for birth in told["births"]) == told["parameters"]
    for index, birth in enumerate(told["births"]):
        squares = torch.zeros(())
        for factors in adapter.layers.values():
            first = sum(factors.born[:index])
            part = slice(first, first + factors.born[index])
            squares = squares + (factors.b_OC[:, part] @ factors.a_CI[part]).square().sum()
        assert birth["energy"] == pytest.approx(squares.sqrt().item(), rel=1e-5)
    for name, layer in told["layers"].items():
        assert layer["born"] == list(adapter.layers[name].born if name in adapter.layers else (0, 0))
    plain = dynlora("inspect", "--adapter", tmp_path / "v2").err
    assert "born in" in plain
    assert "held the earlier ones" in " ".join(plain.split())
    for page in ("README.md", "report.html"):
        text = (tmp_path / "v2" / page).read_text()
        assert "Where its components come from" in text
        assert "held the earlier ones as they were" in text
        assert "Where its components come from" not in (tmp_path / "v1" / page).read_text()
