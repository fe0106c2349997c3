"""Who brought which component: dynlora.json says it, and what is cut or turned keeps it right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft_adapters import make
from tiny_run import make_recipe, train

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.lora.svd_basis import svd_factors

from toy import make as toy


def factors() -> Factors:
    """Three births: 2, 0 and 3 components of a 6x7 layer."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 6, generator=generator), torch.randn(7, 5, generator=generator)
    return Factors(a, b, born=(2, 0, 3))


def test_what_is_kept_is_counted_by_birth() -> None:
    kept = factors().keep(torch.tensor([False, True, True, False, True]))
    assert kept.born == (1, 0, 2)
    assert torch.equal(kept.a_CI, factors().a_CI[[1, 2, 4]])


def test_each_birth_is_turned_by_itself() -> None:
    before = factors()
    turned = before.turned(svd_factors)
    assert turned.born == before.born
    for part in (slice(2), slice(2, 5)):
        own = Factors(before.a_CI[part], before.b_OC[:, part])
        assert torch.allclose(turned.b_OC[:, part] @ turned.a_CI[part], own.delta_OI(), atol=1e-5)


def test_an_adapter_of_another_tool_has_one_birth(tmp_path: Path) -> None:
    folder = make("lora", tmp_path)[1]
    adapter = read_adapter(folder)
    (birth,) = adapter.births
    assert birth["run"] == "sha256:" + sha256_of(folder / "adapter_model.safetensors")[:12]
    assert (birth["name"], birth["date"], birth["old"]) == (folder.name, None, None)
    assert all(each.born == () for each in adapter.layers.values())


def test_a_run_is_its_own_only_birth(tmp_path: Path) -> None:
    train(make_recipe(tmp_path))
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text())
    assert [birth["run"] for birth in record["births"]] == [record["run_id"]]
    assert {name: [layer["rank"]] for name, layer in record["layers"].items()} == {
        name: layer["born"] for name, layer in record["layers"].items()
    }
    assert record["budget"]["start_born"] == {name: [8] for name in record["layers"]}
    assert read_adapter(tmp_path / "out").births[0]["date"] == record["started"]


def test_files_that_the_record_does_not_fit_are_said(tmp_path: Path) -> None:
    train(make_recipe(tmp_path))
    path = tmp_path / "out" / "dynlora.json"
    record = json.loads(path.read_text())
    own = record["births"][0]
    record["births"] = [own | {"run": "first"}, own | {"old": "freeze"}]
    for layer in record["layers"].values():
        layer["born"] = [layer["rank"] // 2, layer["rank"] - layer["rank"] // 2]
    path.write_text(json.dumps(record))
    adapter = read_adapter(tmp_path / "out")
    assert {name: list(each.born) for name, each in adapter.layers.items()} == {
        name: layer["born"] for name, layer in record["layers"].items() if layer["rank"]
    }
    for layer in record["layers"].values():
        layer["born"][1] += 1
    path.write_text(json.dumps(record))
    adapter = read_adapter(tmp_path / "out")
    assert "which component is whose is not known" in (adapter.note or "")
    assert all(each.born == () for each in adapter.layers.values())


def test_a_checkpoint_knows_its_own_components(tmp_path: Path) -> None:
    train(make_recipe(tmp_path))
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["born"] == {name: [count] for name, count in state["counts"].items()}


def test_a_layer_counts_survivors_by_birth() -> None:
    _, pool = toy()
    layer = pool.layers["up"]
    assert (layer.born, layer.old) == ((4,), 0)
    layer.born_at_start = (1, 0, 3)
    assert (layer.born, layer.old) == ((1, 0, 3), 1)
    layer.survivors_C = torch.tensor([0, 2])
    assert layer.born == (1, 0, 1)
    layer.survivors_C = torch.tensor([], dtype=torch.long)
    assert (layer.born, layer.old) == ((0, 0, 0), 0)


@pytest.mark.parametrize("births", [3, [{"run": 1}], [{"run": "a"}]])
def test_a_damaged_lineage_is_refused(tmp_path: Path, births: object) -> None:
    from dynlora_cli.errors import UsageError

    folder = make("lora", tmp_path)[1]
    (folder / "dynlora.json").write_text(json.dumps({"births": births}))
    with pytest.raises(UsageError, match="births"):
        read_adapter(folder)


def test_a_cut_adapter_keeps_its_lineage(tmp_path: Path) -> None:
    adapter = replace(read_adapter(make("lora", tmp_path)[1]), layers={"x": factors()})
    assert adapter.with_layers({"x": factors().keep(torch.arange(5) < 3)}).layers["x"].born == (2, 0, 1)
