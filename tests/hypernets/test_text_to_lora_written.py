"""Adapters that Text-to-LoRA writes: stock PEFT computes what the network does, and those that it learned come back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypernet_runs import hypernet_recipe, texts_of, write_task
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import make_recipe, model_folder, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import adapt_by_hypernet as command
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.layer import place_layers
from dynlora_cli.hypernets.writing import open_writer

IDS = torch.arange(5, 45).view(2, 20)
WORDS = ("ones", "twos", "threes")


def recipe_of(folder: Path, head: str, *overrides: str, out: str, library: list[Path] | None = None) -> Recipe:
    adapter = {"variant": "text-to-lora", "head": head, "latent_size": 16, "hidden_size": 24}
    adapter |= {"library": [str(path) for path in library]} if library else {}
    keys = {"adapter": adapter, "rank": {"budget": 4}}
    settings = ["train.objective=reconstruction"] if library else []
    return hypernet_recipe(folder, *settings, *overrides, out=out, **keys)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of three seeds and two ranks, in one folder."""
    folder = tmp_path_factory.mktemp("library")
    for seed, word in enumerate(WORDS):
        sizes = [f"rank.budget={2 + seed}", f"rank.init={2 + seed}", "adapter.target_modules=attention"]
        settings = ["train.max_steps=25", "train.learning_rate=2e-2", f"seed={seed}", "eval.samples=0"]
        train(make_recipe(folder, f"dataset.train=[{write_task(folder, word)}]", *sizes, *settings, out=word))
    return [folder / word for word in WORDS]


def own_logits(hypernet: Path, description: str) -> torch.Tensor:
    """Those of the base with the network before it, in fp64."""
    read = read_hypernet(hypernet)
    model = AutoModelForCausalLM.from_pretrained(read.form.base.reference).double()
    layers = place_layers(model, [layer.name for layer in read.form.layers])
    condition = open_writer(read).conditions.of([description])
    with torch.no_grad():
        for name, written in read.net.double()(condition.double()).items():
            layers[name].hold(written)
        return model(IDS).logits


def peft_logits(base: str, folder: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        return model.double().eval()(IDS).logits


@pytest.mark.parametrize("rebuilds", [False, True])
@pytest.mark.parametrize("head", ["L", "M", "S"])
def test_stock_peft_gives_the_networks_own_logits(
    library: list[Path], tmp_path: Path, head: str, rebuilds: bool
) -> None:
    settings = ["train.learning_rate=1e-2", "eval.samples=0"]
    train(recipe_of(tmp_path, head, *settings, out="net", library=library if rebuilds else None))
    text = texts_of("twos")[1]
    summary = command.run(command.Request(tmp_path / "net", tmp_path / "a", text))
    assert summary["peft_check"]["problem"] is None
    assert summary["parameters"] == summary["parameters_start"], "as many components are written as the budget has"
    base, want = str(model_folder(tmp_path)), own_logits(tmp_path / "net", text)
    found = peft_logits(base, tmp_path / "a")
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert (peft_logits(base, None) - want).abs().max() > 1e-2 * want.abs().max(), "the adapter does something"


@pytest.mark.parametrize(("head", "most"), [("L", 0.05), pytest.param("S", 0.2, marks=pytest.mark.slow)])
def test_an_adapter_that_was_learned_comes_back_by_its_description(
    library: list[Path], tmp_path: Path, head: str, most: float
) -> None:
    sizes = ["adapter.hidden_size=512", "adapter.latent_size=128", "adapter.target_modules=attention"]
    settings = ["train.max_steps=250", "train.learning_rate=3e-3", "eval.samples=0", "eval.steps=250"]
    train(recipe_of(tmp_path, head, *sizes, *settings, out="net", library=library))
    for word, folder in zip(WORDS, library, strict=True):
        command.run(command.Request(tmp_path / "net", tmp_path / word, texts_of(word)[0]))
        made, wanted = read_adapter(tmp_path / word).layers, read_adapter(folder).layers
        errors = [(made[name].delta_OI() - layer.delta_OI()).square().sum() for name, layer in wanted.items()]
        whole = sum(layer.energy() ** 2 for layer in wanted.values())
        assert sum(errors) < most * whole, word


def test_a_network_with_spreads_is_compared_with_its_file_as_well(library: list[Path], tmp_path: Path) -> None:
    train(recipe_of(tmp_path, "M", "train.max_steps=1", "eval.samples=0", out="net", library=library))
    folder = Path(shutil.copytree(tmp_path / "net", tmp_path / "copy"))
    tensors = load_file(folder / "hypernet.safetensors")
    spreads = [name for name in tensors if name.endswith("spread_b_MOC")]
    assert spreads
    del tensors[spreads[0]]
    save_file(tensors, folder / "hypernet.safetensors")

    text = (folder / "hypernet.json").read_text()
    old = sha256_of(tmp_path / "net" / "hypernet.safetensors")
    (folder / "hypernet.json").write_text(text.replace(old, sha256_of(folder / "hypernet.safetensors")))
    with pytest.raises(UsageError, match="is of another network"):
        command.run(command.Request(folder, tmp_path / "a", "Say ones."))
