"""Runs that train Text-to-LoRA, end to end and on adapters that exist."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import NAMES, lines, make_library, model_folder, train, write_rows_of

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import Interrupted, RecipeError, UsageError

HEADS = ("L", "M", "S")
SMALL = {"variant": "text-to-lora", "latent_size": 32, "hidden_size": 64}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters that have learned enough to differ, of ranks that differ."""
    folder = tmp_path_factory.mktemp("library")
    make_library(folder, "train.max_steps=60", "train.learning_rate=2e-2")
    return folder


@pytest.fixture
def own(library: Path, tmp_path: Path) -> Path:
    """A folder of this test's own, with the library in it."""
    for path in library.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path


def sources(folder: Path, names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    return [
        {"path": str(write_rows_of(folder, name)), "descriptions": [f"Repeat the word {name}.", f"Say {name} again."]}
        for name in names
    ]


def recipe_of(folder: Path, *overrides: str, out: str = "net", rebuild: bool = True, **adapter: Any) -> Recipe:
    """A recipe of 12 steps on the rows of the library's adapters, or on these themselves (`rebuild`)."""
    recipe: dict[str, Any] = {
        "model": str(model_folder(folder)),
        "dataset": {"train": sources(folder), "val_size": 0.2, "max_length": 96},
        "adapter": {**SMALL, **adapter},
        "train": {"max_steps": 12, "micro_batch_size": 4, "learning_rate": 1e-3, "log_steps": 1},
        "eval": {"steps": 4, "samples": 0},
        "output_dir": str(folder / out),
    }
    if rebuild:
        recipe["adapter"] |= {"library": [str(folder / name) for name in NAMES]}
        recipe["train"] |= {"objective": "reconstruction"}
    path = folder / f"{out}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return load_recipe(path, overrides)


def numbers(folder: Path) -> dict[str, Any]:
    return load_file(folder / "hypernet.safetensors")


def notes(events: list[dict[str, Any]]) -> str:
    return "\n".join(next(event for event in events if event["event"] == "start")["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_it_learns_three_tasks_from_their_rows(library: Path, head: str) -> None:
    recipe = recipe_of(
        library, "train.max_steps=80", "train.learning_rate=2e-3", out=f"sft-{head}", rebuild=False, head=head
    )
    summary, _ = train(recipe)
    assert summary["loss_after"] < 0.6 * summary["loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_it_writes_adapters_that_exist_so_that_they_do_what_they_did(library: Path, head: str) -> None:
    before = [json.loads((library / name / "dynlora.json").read_text())["summary"] for name in NAMES]
    mean = sum(one["loss_after"] for one in before) / len(NAMES)
    settings = ("train.max_steps=300", "train.learning_rate=1e-2", "train.micro_batch_size=8")
    summary, events = train(recipe_of(library, *settings, out=f"rebuilt-{head}", head=head))
    assert summary["loss_before"] > 1.3 * mean  # the mean of the adapters is none of them
    assert summary["loss_after"] < 1.05 * mean
    assert "ones.jsonl for ones" in notes(events)
    assert "layers of the adapters have fewer components than are written" in notes(events)
    logged = [line["loss"] for line in lines(library / f"rebuilt-{head}" / "metrics.jsonl") if line["event"] == "train"]
    assert logged[-1] < 0.2 * logged[0]


@pytest.mark.parametrize(
    ("rebuild", "head"), [(True, "L"), (False, "S"), pytest.param(True, "M", marks=pytest.mark.slow)]
)
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_it_would_have(library: Path, rebuild: bool, head: str) -> None:
    through, broken = (
        recipe_of(library, out=f"{rebuild}-{head}-{name}", rebuild=rebuild, head=head) for name in ("through", "broken")
    )
    train(through)
    with pytest.raises(Interrupted):
        train(broken, interrupt_at=6)
    train(broken, resume=True)
    folders = [Path(recipe.output_dir) for recipe in (through, broken)]
    one, two = (numbers(folder) for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[line for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in folders]
    assert logs[0] == logs[1]


def test_the_seed_decides_and_nothing_else_does(library: Path) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        recipe = recipe_of(library, "train.max_steps=2", f"seed={seed}", out=f"seed-{number}", rebuild=False)
        train(recipe)
        found.append((library / f"seed-{number}" / "hypernet.safetensors").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_it_does_not_go_on_with_another_adapter(own: Path) -> None:
    recipe = recipe_of(own)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    shutil.rmtree(own / "ones")
    shutil.copytree(own / "twos", own / "ones")
    record = json.loads((own / "ones/dynlora.json").read_text())
    (own / "ones/dynlora.json").write_text(json.dumps(record | {"name": "ones"}))
    with pytest.raises(UsageError, match="ones is not the adapter that the run began with"):
        train(recipe, resume=True)


def test_a_description_is_one_adapters_alone(library: Path) -> None:
    twice = sources(library)
    twice[1]["descriptions"] = twice[0]["descriptions"][:1]
    with pytest.raises(UsageError, match="describes ones and twos"):
        train(recipe_of(library, "dataset.train=" + json.dumps(twice), out="twice"))


@pytest.mark.parametrize("head", HEADS)
def test_how_large_the_network_is_and_what_it_writes_is_said(library: Path, head: str) -> None:
    summary, events = train(recipe_of(library, "train.max_steps=1", out=f"size-{head}", rebuild=False, head=head))
    stored = sum(
        tensor.numel() for name, tensor in numbers(library / f"size-{head}").items() if name.startswith("net.")
    )
    layers = json.loads((library / f"size-{head}" / "hypernet.json").read_text())["layers"]
    adapter = sum(layer["rank"] * (layer["d_in"] + layer["d_out"]) for layer in layers)
    trained = summary["parameters"]
    assert f"{trained:,} numbers that train and {stored - trained:,} that do not" in notes(events)
    assert f"an adapter of it has {adapter:,}\n" in notes(events) + "\n"
    assert stored - trained == adapter  # the plain LoRA that is below what is written


def test_each_adapter_has_a_source(library: Path) -> None:
    fewer = json.dumps(sources(library)[:2])
    with pytest.raises(UsageError, match="there are 2 sources for 3 adapters"):
        train(recipe_of(library, f"dataset.train={fewer}", out="fewer"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.library=null"], "it learns from adapters"),
        (["adapter.variant=text-gated", "adapter.head=null"], "adapter.head"),
        (["train.objective=sft"], "adapter.library"),
    ],
)
def test_what_does_not_go_with_adapters_to_learn_from_is_refused(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(tmp_path, *overrides)
    assert any(words in problem for problem in caught.value.problems)


def test_other_variants_do_not_reconstruct(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    recipe_of(tmp_path)
    recipe = json.loads((tmp_path / "net.yaml").read_text())
    recipe["adapter"] = {"variant": "lora", "library": recipe["adapter"]["library"]}
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ())
    assert any("adapters are written number by number by text-to-lora alone" in text for text in caught.value.problems)
