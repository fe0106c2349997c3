"""Bases that are stored in 4 or 8 bits, as the many `*-bnb-4bit` repositories: merged every way, and no dead hint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from pico import pico_model, pico_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from dynlora_cli.models.find import quantization_of

pytestmark = pytest.mark.slow
KINDS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A full model and a run on what bitsandbytes stored of it."""
    folder = tmp_path_factory.mktemp("quantized")
    full = pico_model(folder)
    options = BitsAndBytesConfig(**KINDS[request.param])
    AutoModelForCausalLM.from_pretrained(full, quantization_config=options).save_pretrained(folder / "stored")
    AutoTokenizer.from_pretrained(full).save_pretrained(folder / "stored")
    recipe = pico_recipe(folder, model=str(folder / "stored"))
    return full, recipe


def test_every_way_and_every_hint(trained: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    full, recipe = trained
    run = recipe.parent / "out"
    assert dynlora("train", recipe, "--overwrite").code == 0
    merge = ["merge", "--adapter", run]
    refused = dynlora(*merge, "--out", tmp_path / "0")
    assert refused.code == 2
    assert "--base FOLDER" in refused.err
    assert "--base-weights dequantized" in refused.err
    as_seen = dynlora(*merge, "--base-weights", "dequantized", "--out", tmp_path / "1", "--json")
    named = dynlora(*merge, "--base", full, "--out", tmp_path / "2", "--json")
    both = dynlora(*merge, "--base", full, "--base-weights", "dequantized", "--out", tmp_path / "3", "--json")
    for answer in (as_seen, named, both):
        assert answer.code == 0, answer.err
        assert answer.json["check"]["kl"] < 1e-6
    assert named.json["trained_base"]["kl"] > named.json["check"]["kl"]
    for number in "123":
        assert quantization_of(tmp_path / number) is None
    same = [AutoModelForCausalLM.from_pretrained(tmp_path / number).state_dict() for number in "13"]
    assert same[0].keys() == same[1].keys()
    for name, tensor in same[0].items():
        torch.testing.assert_close(tensor, same[1][name], rtol=1e-5, atol=1e-6)
    exported = dynlora("export", "--adapter", run, "--to", "peft", "--out", tmp_path / "4")
    assert exported.code == 0, exported.err


def test_a_model_of_other_sizes_or_other_numbers(trained: tuple[Path, Path], tmp_path: Path, dynlora: Dynlora):
    full, recipe = trained
    run = recipe.parent / "out"
    if not run.is_dir():
        assert dynlora("train", recipe).code == 0
    config = LlamaConfig.from_pretrained(full, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    answer = dynlora("merge", "--adapter", run, "--base", tmp_path / "small", "--out", tmp_path / "out")
    assert (answer.code, "its num_hidden_layers is 1, and 2 there" in " ".join(answer.err.split())) == (2, True)
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(full, initializer_range=1.0))
    other.save_pretrained(tmp_path / "other")
    for path in full.glob("*token*"):
        shutil.copy(path, tmp_path / "other")
    answer = dynlora("merge", "--adapter", run, "--base", tmp_path / "other", "--out", tmp_path / "out")
    assert (answer.code, "than quantizing explains" in " ".join(answer.err.split())) == (4, True), answer.err
    assert not (tmp_path / "out").exists()
