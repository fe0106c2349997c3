"""The folder of a trained router: self-contained, read like any adapter, and refused where one update is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file, save_file
from tiny_run import NAMES, make_library, model_folder, router_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.find import find_adapter, find_origin
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.whole import sha256_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    make_library(folder)
    train(router_recipe(folder, "phatgoose"))
    return folder


@pytest.fixture
def routed(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, far from the library."""
    return Path(shutil.copytree(trained / "router", tmp_path / "moved"))


def logits(folder: Path, model: Any) -> torch.Tensor:
    ids = torch.arange(3, 19).view(2, 8)
    with attached(model, read_adapter(folder, routed=True)), torch.no_grad():
        return model(input_ids=ids).logits


def test_it_needs_nothing_outside_its_folder_and_leaves_the_model_as_it_was(trained: Path, routed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(trained)).eval()
    ids = torch.arange(3, 19).view(2, 8)
    before = model(input_ids=ids).logits
    there, here = logits(trained / "router", model), logits(routed, model)
    assert torch.equal(there, here)
    assert not torch.allclose(here, before, atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(trained)).eval()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="input_ids"), attached(model, read_adapter(trained / "router", routed=True)):
        model(nonsense=1)
    assert [name for name, _ in model.named_modules()] == names


def test_the_run_speaks_for_the_adapters_below_it(routed: Path) -> None:
    found, note = find_adapter(routed.parent)
    assert found == routed
    assert "newest" in str(note)
    (routed / "dynlora.json").unlink()
    assert find_adapter(routed.parent)[0] == routed
    assert read_adapter(routed / "adapters" / "ones").record == {}


def test_an_adapter_that_is_left_out_says_nothing(trained: Path, routed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(trained)).eval()
    form = json.loads((routed / "router.json").read_text())
    (routed / "router.json").write_text(json.dumps(form | {"off": ["twos", "threes"], "options": {"top_k": 1}}))
    adapter = read_adapter(routed, routed=True)
    assert isinstance(adapter, RoutedAdapter)
    assert adapter.off == ("twos", "threes")
    alone = logits(routed / "adapters" / "ones", model)
    torch.testing.assert_close(logits(routed, model), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": [{"name": "../ones", "sha256": "0" * 64}]}, "a name"),
        ({"adapters": [{"name": "ones", "sha256": "0" * 64}]}, "is not the file that router.json is about"),
        ({"adapters": [{"name": "fours", "sha256": "0" * 64}]}, "is missing"),
        ({"sha256": "0" * 64}, "router.safetensors is not the file"),
        ({"off": list(NAMES)}, "all adapters are `off`"),
        ({"off": ["fours"]}, "one in `off` that is not there"),
        ({"method": "lora"}, "no router is called 'lora'"),
        ({"method": "os"}, "no router is called 'os'"),
        ({"options": {"top_k": 0}}, "options.top_k"),
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"code": "x"}, "code"),
    ],
)
def test_what_others_may_have_written_is_checked(routed: Path, change: dict[str, Any], words: str) -> None:
    form = json.loads((routed / "router.json").read_text())
    (routed / "router.json").write_text(json.dumps(form | change))
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        read_adapter(routed, routed=True)


@pytest.mark.parametrize("kind", [torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_strange_types_are_refused_in_words(routed: Path, kind: torch.dtype) -> None:
    file, form = routed / "router.safetensors", json.loads((routed / "router.json").read_text())
    save_file({name: value.to(kind) for name, value in load_file(file).items()}, file)
    (routed / "router.json").write_text(json.dumps(form | {"sha256": sha256_of(file)}))
    if kind.is_complex:
        with pytest.raises(UsageError, match="complex numbers"):
            read_adapter(routed, routed=True)
    else:
        assert isinstance(read_adapter(routed, routed=True), RoutedAdapter)
    plain = routed / "adapters" / NAMES[0]
    file = plain / "adapter_model.safetensors"
    save_file({name: value.to(kind) for name, value in load_file(file).items()}, file)
    if kind.is_complex:
        with pytest.raises(UsageError, match="complex numbers"):
            read_adapter(plain)
    else:
        read_adapter(plain)


def test_numbers_that_would_end_in_nan_are_refused(routed: Path) -> None:
    file, form = routed / "router.safetensors", json.loads((routed / "router.json").read_text())
    save_file({name: torch.full_like(value, 1e38) for name, value in load_file(file).items()}, file)
    (routed / "router.json").write_text(json.dumps(form | {"sha256": sha256_of(file)}))
    with pytest.raises(MeasureError, match=r"router\.safetensors: .* has numbers beyond 1e\+12"):
        read_adapter(routed, routed=True)


def test_a_run_cannot_go_on_from_a_router_but_from_an_adapter_that_has_others_below_it(
    routed: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no sum of components"):
        find_origin(routed, tmp_path / "out")
    plain = shutil.copytree(routed / "adapters" / NAMES[0], tmp_path / "plain")
    shutil.copytree(plain, tmp_path / "plain" / "adapters" / "x", ignore=shutil.ignore_patterns("adapters"))
    assert find_origin(plain, tmp_path / "out") == plain


def test_links_out_of_the_folder_are_refused(trained: Path, routed: Path) -> None:
    shutil.rmtree(routed / "adapters" / "ones")
    (routed / "adapters" / "ones").symlink_to(trained / "router" / "adapters" / "ones")
    with pytest.raises(UsageError, match="link"):
        read_adapter(routed, routed=True)


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--adapter", "ROUTER", "--out", "m"],
        ["prune", "--adapter", "ROUTER", "--budget", "0.5", "--out", "p"],
        ["export", "--adapter", "ROUTER", "--to", "uniform", "--out", "x"],
        ["library", "add", "L", "--adapter", "ROUTER"],
    ],
)
def test_where_one_update_is_needed_it_says_what_to_do(
    routed: Path, command: list[str], dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(routed.parent)
    answer = dynlora(*(word.replace("ROUTER", str(routed)) for word in command))
    assert answer.code == 2
    said = " ".join(answer.err.split())
    assert "is a router over adapters" in said
    assert "dynlora merge --adapter" in said


@pytest.mark.slow
def test_eval_and_inspect_take_it(routed: Path, dynlora: Dynlora) -> None:
    report = dynlora("eval", "--adapter", routed, "--json").json
    assert report["adapters"][0]["loss"] < report["base"]["loss"]
    found = dynlora("inspect", "--adapter", routed, "--json").json["adapters"][0]
    assert [one["name"] for one in found["adapters"]] == list(NAMES)
    assert found["router"]["model.layers.0.self_attn.q_proj.v_EI"]["norm"] > 0
    assert "PHATGOOSE router over 3 adapters" in dynlora("inspect", "--adapter", routed).err
