"""`dynlora inspect`: what it tells is what the factors say, for any adapter, and two side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from peft_adapters import KINDS, exact_delta, make
from tiny_run import make_recipe, train

from dynlora_cli.adapters.read import read_adapter


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_adapter(kind: str, tmp_path: Path, dynlora: Dynlora):
    _, folder = make(kind, tmp_path)
    before = contents(tmp_path)
    answer = dynlora("inspect", "--adapter", folder, "--json")
    assert answer.code == 0, answer.err
    assert contents(tmp_path) == before
    (told,) = answer.json["adapters"]
    adapter = read_adapter(folder)
    assert (told["parameters"], told["components"]) == (adapter.parameters, adapter.components)
    names = {"dora": "DoRA", "hira": "HiRA", "vera": "VeRA, as the LoRA that it equals"}
    assert told["kind"] == next((name for word, name in names.items() if word in kind), "LoRA")
    for name, factors in adapter.layers.items():
        values = torch.linalg.svdvals(exact_delta(factors))[: factors.rank]
        assert told["layers"][name]["spectrum"] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-9)
        assert told["layers"][name]["energy"] == pytest.approx(exact_delta(factors).norm().item())
    assert set(told["whole_tensors"]) == set(adapter.whole)
    plain = dynlora("inspect", "--adapter", folder)
    assert (plain.code, plain.out) == (0, "")
    for name in adapter.layers:
        assert name in plain.err


@pytest.mark.slow
def test_a_run_of_ours_tells_where_it_comes_from(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path, "rank.budget=0.1")
    summary, _ = train(recipe)
    answer = dynlora("inspect", "--adapter", recipe.output_dir, "--json")
    (told,) = answer.json["adapters"]
    assert {name: layer["rank"] for name, layer in told["layers"].items()} == summary["ranks"]
    assert told["provenance"]["base_model"] == recipe.model.name_or_path
    assert {"fingerprint", "data_sha256", "seed", "finished"} <= told["provenance"].keys()
    assert told["average_rank"] == pytest.approx(
        summary["parameters"] / sum(layer["d_in"] + layer["d_out"] for layer in told["layers"].values())
    )
    assert "·" in answer.err, "layers at rank 0 are in the map"


def test_two_side_by_side(tmp_path: Path, dynlora: Dynlora):
    (tmp_path / "b").mkdir()
    _, first = make("lora", tmp_path)
    _, second = make("patterns", tmp_path / "b")
    answer = dynlora("inspect", "--adapter", first, "--adapter", second, "--json")
    assert answer.code == 0, answer.err
    compared = answer.json["comparison"]["layers"]
    one, two = read_adapter(first), read_adapter(second)
    assert compared.keys() == one.layers.keys() | two.layers.keys()
    for name, told in compared.items():
        assert told["ranks"] == [adapter.ranks.get(name, 0) for adapter in (one, two)]
        if name in two.layers:
            a, b = exact_delta(one.layers[name]).flatten(), exact_delta(two.layers[name]).flatten()
            assert told["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    same = dynlora("inspect", "--adapter", first, "--adapter", first, "--json").json["comparison"]
    assert same["cosine"] == pytest.approx(1.0)
    assert dynlora("inspect", "--adapter", first, "--adapter", first, "--adapter", first).code == 2
