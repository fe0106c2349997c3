"""The recipes of models that people name, each tried on what is published of its model: its config, and no weights.

tests/fixtures/published/NAME.json holds the config.json of a model, where it was read, and how many parameters the model
is said to have. A folder with that config and a small tokenizer is all that `dynlora train --dry-run` needs.

`UPDATE_GOLDEN=1 pytest tests/models/test_named_models.py` writes the memory into the recipes' headers anew.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from data_helpers import ROLE_TOKENS, byte_tokenizer

from dynlora_cli.commands.dry_run import plan
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.models.load import load_structure
from dynlora_cli.models.quiet import quiet
from dynlora_cli.training.memory_estimate import CUDA_BYTES, USABLE

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GPUs as they are sold, in GB
# Layers that get components: blocks, times those of a block. Experts and routers are none of them.
LAYERS = {
    "smollm2-135m": 30 * 7,
    "smollm2-360m": 32 * 7,
    "smollm2-1.7b": 24 * 7,
    "qwen3-0.6b": 28 * 7,
    "qwen3-8b": 36 * 7,
    "qwen3-30b-a3b": 48 * 4,
    "llama-3.2-1b": 16 * 7,
    "llama-3.1-8b": 32 * 7,
    "gemma-3-1b": 26 * 7,
    "gemma-3-4b": 34 * 7,  # the language model's
    "mistral-7b": 32 * 7,
    "mistral-small-24b": 40 * 7,
    "phi-4-mini": 32 * 4,  # queries, keys and values in one, and so gate and up
    "phi-4": 40 * 4,
    "olmo-2-1b": 16 * 7,
    "gpt-oss-20b": 24 * 4,
    "glm-4.5-air": 46 * 4 + 3 + 45 * 3,  # attention, one dense block, the experts that every token passes
    "modernbert-base": 22 * 4,
    "flan-t5-base": 12 * 7 + 12 * 11,  # the decoder has two attentions
}
MODELS = sorted(path.stem for path in PUBLISHED.glob("*.json"))
# One of each kind is tried with the other tests, and all of them in the long suite.
FAST = {"modernbert-base-lora"}
SLOW = {
    "smollm2-135m-chat",
    "llama-3.2-1b-lora",
    "gemma-3-1b-lora",
    "flan-t5-base-lora",
}


@cache
def published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def model_of(recipe: Path) -> str:
    """The file in PUBLISHED of the model that a recipe names; "" where there is none."""
    model = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    named = model if isinstance(model, str) else model["name_or_path"]
    return next((name for name in MODELS if published(name)["model"] == named), "")


RECIPES = {
    path.stem: path
    for path in sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "untested").glob("*.yaml")])
    if model_of(path)
}


def model_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A model's folder without weights: its config, and a tokenizer of single bytes with a chat template."""
    byte_tokenizer(ROLE_TOKENS).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def long_rows(path: Path, task: str) -> Path:
    """Rows that are longer than any recipe's `max_length`, in the form that a task reads."""
    long = "x" * 9000
    lines = []
    for index in range(40):
        row: dict[str, Any] = {
            "sequence-classification": {"text": f"{index} {long}", "label": ("good", "bad")[index % 2]},
            "embedding": {"anchor": f"{index} {long}", "positive": f"{index} {long}"},
            "seq2seq-lm": {"prompt": f"{index} {long}", "completion": long},
        }.get(task, {"messages": [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": long}]})
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def planned(recipe: Path, folder: Path, *changes: str) -> dict[str, Any]:
    """What `--dry-run` says of a recipe, as of a GPU that computes in bf16, with rows of full length."""
    model = model_folder(folder / "model", published(model_of(recipe))["config"])
    rows = long_rows(folder / "rows.jsonl", load_recipe(recipe).model.task)
    own = [f"model.name_or_path={model}", "model.dtype=bfloat16", f"dataset.train={rows}", "train.max_steps=100"]
    return plan(load_recipe(recipe, [*own, *changes]))


def hardware(need: dict[str, int], devices: int) -> str:
    """The header's line, from what `--dry-run` found; the base is shared by the devices."""
    base = need["base"] / devices
    total = base + need["adapter"] + need["optimizer"] + need["activations"] + CUDA_BYTES
    card = next(size for size in CARDS if total <= USABLE * size * 1e9)
    cards = f"1 GPU with {card} GB" if devices == 1 else f"{devices} GPUs with {card} GB each"
    trained, rest = (need["adapter"] + need["optimizer"]) / 1e9, need["activations"] / 1e9
    rows = f"{need['rows']} x {need['length']:,} tokens"
    return (
        f"{cards}: {total / 1e9:.1f} GB by --dry-run for {rows} "
        f"(base {base / 1e9:.1f}, adapter and optimizer {trained:.1f}, activations {rest:.1f})"
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_config_makes_the_model_that_is_published(name: str, tmp_path: Path):
    facts = published(name)
    assert facts["source"]
    assert facts["parameters_said"]
    task = {"t5": "seq2seq-lm", "modernbert": "embedding"}.get(facts["config"]["model_type"], "causal-lm")
    with quiet:
        folder = model_folder(tmp_path, facts["config"])
        model: Any = load_structure(Model(name_or_path=str(folder), task=task), folder, None)
    part = model.model.language_model if facts.get("text_part") else model
    count = sum(parameter.numel() for parameter in part.parameters())
    if name == "flan-t5-base":  # whose head is its own: transformers says so once it sees the files
        count += model.lm_head.weight.numel()
    assert count == pytest.approx(facts["parameters"], rel=0.01)


def test_every_model_has_a_recipe():
    assert {model_of(path) for path in RECIPES.values()} == set(MODELS) == set(LAYERS)


def marked(name: str) -> Any:
    """A recipe as a parameter, in the suite that has the time for it."""
    return name if name in FAST else pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.long)


@pytest.mark.parametrize("name", [marked(name) for name in RECIPES])
def test_a_recipe_fits_its_model(name: str, tmp_path: Path):
    recipe = RECIPES[name]
    found = planned(recipe, tmp_path)
    modules, parameters, model = found["modules"], found["parameters"], model_of(recipe)
    pooler = load_recipe(recipe).model.task == "sequence-classification"  # a dense layer before the classifier
    assert len(modules) == LAYERS[model] + pooler
    assert parameters["budget"] == load_recipe(recipe).rank.budget * sum(m["d_in"] + m["d_out"] for m in modules)
    assert (
        parameters["start"]
        == 2 * parameters["budget"]
        == sum(m["components"] * (m["d_in"] + m["d_out"]) for m in modules)
    )
    if "untested" not in recipe.parts:
        return  # its numbers were measured
    header = recipe.read_text(encoding="utf-8")
    devices = int(next(iter(re.findall(r"--devices (\d+)", header)), 1))
    line = f"# Hardware: {hardware(found['memory'], devices)}"
    if os.environ.get("UPDATE_GOLDEN"):
        header = re.sub(r"(?m)^# Hardware: .*", line, header)
        recipe.write_text(header, encoding="utf-8")
    assert line in header.splitlines(), "UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.long
def test_a_head_of_its_own_counts(tmp_path: Path):
    recipe = RECIPES["flan-t5-base-lora"]
    config = published("flan-t5-base")["config"]
    own = planned(recipe, tmp_path / "own", "train.micro_batch_size=1", "dataset.max_length=16")
    config = config | {"tie_word_embeddings": True}
    folder = model_folder(tmp_path / "shared", config)
    changes = [f"model.name_or_path={folder}", "train.micro_batch_size=1", "dataset.max_length=16"]
    shared = planned(recipe, tmp_path / "other", *changes)
    head = config["vocab_size"] * config["d_model"]
    assert own["parameters"]["base"] - shared["parameters"]["base"] == head
    assert own["memory"]["base"] - shared["memory"]["base"] == 2 * head


@pytest.mark.long
def test_experts_that_stay_large_are_named(tmp_path: Path):
    found = planned(RECIPES["qwen3-30b-a3b-lora"], tmp_path, "model.load_in_4bit=true", "dataset.max_length=64")
    assert found["memory"]["base"] > 57e9
    assert any("experts are no linear layers and stay as they are, 58.0 GB" in note for note in found["notes"])
    advice = next(note for note in found["notes"] if "may not fit" in note)
    assert "load_in_4bit" not in advice
    assert "gradient_checkpointing" not in advice


def test_what_is_stored_in_few_bits_is_not_quantized_again(tmp_path: Path):
    with pytest.raises(UsageError, match=r"load_in_4bit: the weights in .* are stored quantized by mxfp4 already"):
        planned(RECIPES["gpt-oss-20b-lora"], tmp_path, "model.load_in_4bit=true")


def test_a_plan_fetches_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[list[str]] = []
    folder = model_folder(tmp_path / "hub", published("smollm2-360m")["config"] | {"num_hidden_layers": 2})

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    rows = long_rows(tmp_path / "rows.jsonl", "causal-lm")
    small = [f"dataset.train={rows}", "dataset.max_length=16", "train.micro_batch_size=1"]
    plan(load_recipe(RECIPES["smollm2-360m-lora"], small))
    assert asked
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
