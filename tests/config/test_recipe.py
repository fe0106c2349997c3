"""Recipes: defaults, shorthands, budgets, overrides, round trip, schema, and what may be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dynlora_cli import plugins
from dynlora_cli.config.adapter_section import Adapter
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.config.load import json_schema, to_yaml
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Dataset, Model, Source, TrainSource
from dynlora_cli.config.types import Section

from recipe_helpers import MINIMAL, load, problems, schema_keys

DESIGN = """
model:
  name_or_path: builtin:tiny
  revision: null
  task: causal-lm
  dtype: auto
  load_in_4bit: false
  load_in_8bit: false
  bnb_4bit_quant_type: nf4
  bnb_4bit_use_double_quant: true
  attn_implementation: null
  trust_remote_code: false
dataset:
  train: [{path: rows.jsonl, format: auto}]
  val: []
  val_size: 0.05
  max_length: 1024
  packing: false
  train_on: auto
  overlong: truncate
  chat_template: null
adapter:
  variant: lora
  target_modules: all-linear
  scaling: lora
  alpha: auto
  dropout: 0.0
  init_weights: default
rank:
  init: auto
  budget: 8
pruning:
  policy: fisher
  start: auto
  end: auto
  lr_coupling: 0.5
  events: auto
  tolerance: null
train: {epochs: auto, max_steps: null, micro_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: auto,
        lr_scheduler: cosine, warmup_ratio: 0.03, weight_decay: 0.0, max_grad_norm: 1.0, gradient_checkpointing: false, fused: true,
        optimizer: adamw, log_steps: 10, save_steps: null, report_to: []}
eval: {steps: null, max_samples: null, early_stopping_patience: null}
output_dir: out/name
seed: 0
"""


def test_the_design_recipe_holds_the_defaults() -> None:
    expected = Recipe(
        model=Model(name_or_path="builtin:tiny"),
        dataset=Dataset(train=[TrainSource(path="rows.jsonl")]),
        output_dir="out/name",
    )
    assert load(DESIGN) == expected
    assert load(MINIMAL, output_dir="out/name") == expected


def test_shorthands_and_the_default_folder() -> None:
    recipe = load("model: some/name\ndataset: rows.jsonl\ntrain:\n")
    assert recipe.model == Model(name_or_path="some/name")
    assert recipe.dataset == Dataset(train=[TrainSource(path="rows.jsonl")])
    assert recipe.output_dir == "out/recipe"
    assert load("model: x\ndataset: {train: [a, {path: b, split: c}]}\n").dataset.train[0] == TrainSource(path="a")
    written = load("model: x\ndataset: {train: a, val: b}\n", "dataset.train=c").dataset
    assert (written.train, written.val) == ([TrainSource(path="c")], [Source(path="b")])


@pytest.mark.parametrize("value", ["1e300", "1" + "0" * 30, "1" + "0" * 400, "9007199254740992"])
def test_counts_beyond_all_use_are_refused_in_short_words(value: str) -> None:
    (found, *more) = problems(MINIMAL, f"train.micro_batch_size={value}")
    assert "train.micro_batch_size" in found
    assert all(len(line) < 400 for line in (found, *more))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).train.epochs = 2


@pytest.mark.parametrize(
    ("value", "kind", "amount"),
    [
        ("8", "rank", 8),
        ("8.0", "rank", 8),
        ("1", "rank", 1),
        ("0.5", "share", 0.5),
        ("1e-3", "share", 1e-3),
        ("2M", "parameters", 2e6),
        ("500k", "parameters", 5e5),
        ("1.5M", "parameters", 1.5e6),
        ("1B", "parameters", 1e9),
    ],
)
def test_budget_forms(value: str, kind: str, amount: float) -> None:
    recipe = load(MINIMAL + f"rank: {{budget: {value}}}\n")
    assert recipe.rank.parsed_budget() == (kind, amount)
    assert load(to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    "value", ["0", "-3", "1.0", "0.0", "8.5", "true", "null", "many", "0M", "50%", ".nan", ".inf", "[8]"]
)
def test_a_wrong_budget_explains_the_three_forms(value: str) -> None:
    (problem,) = problems(MINIMAL + f"rank:\n  budget: {value}\n")
    assert problem.startswith("recipe.yaml:4: rank.budget: got ")
    assert "average rank" in problem
    assert "share" in problem
    assert "2M" in problem


def test_a_huge_rank_is_taken_for_a_parameter_count() -> None:
    with pytest.raises(ValueError, match="written like 2M"):
        parse_budget(2_000_000)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-5", 1e-5),
        ("train.report_to=[wandb, mlflow]", ["wandb", "mlflow"]),
        ("train.report_to=wandb", ["wandb"]),
        ("dataset.train.0.ignore=score", ["score"]),
        ("train={epochs: 3}", {"epochs": 3}),
        ("train.max_steps=1e3", 1000),
        ("eval.steps=null", None),
        ("eval.steps=", None),
        ("model.revision='1234'", "1234"),
        ("dataset.train.0.path=a=b.jsonl", "a=b.jsonl"),
        ("dataset.train.1.path=more.jsonl", "more.jsonl"),
        ("dataset.val.0.path=held-out.jsonl", "held-out.jsonl"),
        ("dataset.train.0.columns.prompt=question", "question"),
    ],
)
def test_set(override: str, value: object) -> None:
    found: Any = load(MINIMAL, override).model_dump()
    for step in override.partition("=")[0].split("."):
        found = found[int(step)] if step.isdecimal() else found[step]
    assert found == value or (isinstance(value, dict) and value.items() <= found.items())


def test_set_a_shorthand_keeps_the_rest_of_its_section() -> None:
    text = "model: {name_or_path: a, dtype: float32}\ndataset: {train: [a], max_length: 64}\n"
    recipe = load(text, "model=b", "dataset=b.jsonl")
    assert recipe.model == Model(name_or_path="b", dtype="float32")
    assert recipe.dataset == Dataset(train=[TrainSource(path="b.jsonl")], max_length=64)


def test_the_last_set_wins_and_the_output_dir_option_over_all() -> None:
    recipe = load(MINIMAL + "output_dir: a\n", "seed=1", "seed=2", "output_dir=b", output_dir="c")
    assert (recipe.seed, recipe.output_dir) == (2, "c")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "must be written section.key=value"),
        ("=1", "must be written section.key=value"),
        ("train..epochs=1", "must be written section.key=value"),
        ("seed.x=1", "seed is 3 and has no 'x'"),
        ("dataset.train.2.path=x", "dataset.train is a list of 1 and has no '2'"),
        ("dataset.train.first.path=x", "dataset.train is a list of 1 and has no 'first'"),
        ("train.report_to=[wandb", "not closed"),
        ("train={epochs: 1, epochs: 2}", "repeated key"),
    ],
)
def test_a_bad_set_is_its_own_place(override: str, words: str) -> None:
    (problem,) = problems(MINIMAL + "seed: 3\n", override)
    assert problem.startswith(f"--set {override}: ")
    assert words in problem


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.learning_rate=1e-7", "adapter.alpha=1e20", "rank.budget=2M", "model.revision='1e5'"],
        ["adapter.target_modules=['*.q_proj', 'on', '12']", "dataset.train.0.columns={prompt: 'é: #1'}"],
        ['dataset.chat_template="{% for m in messages %}\\n{{ m }}\\n{% endfor %}"', "output_dir=' out '"],
    ],
)
def test_to_yaml_reads_back_equal(overrides: list[str]) -> None:
    recipe = load(MINIMAL, *overrides)
    text = to_yaml(recipe)
    assert load(text) == recipe
    assert to_yaml(load(text)) == text


def test_schema_describes_every_key_and_allows_no_other() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for path, node in schema_keys(schema):
        assert node.get("description", "").strip(), path
        assert (
            "default" in node
            or path
            in ("model", "dataset", "model.name_or_path", "dataset.train", "eval.also.name", "dataset.retrieve.corpus")
            or path.endswith((".path", "new_tokens.content"))
        )
    sections = [schema, *schema["$defs"].values()]
    below = [Section, *Section.__subclasses__()]
    below += [section for parent in below[1:] for section in parent.__subclasses__()]
    names = {section.__name__ for section in below if section.__module__ in (Dataset.__module__, Adapter.__module__)}
    written = [name for name in names if not name.startswith("_") and name not in ("Section", "Recipe")]
    assert len(sections) == len(written)  # of which `Settings` is the schema itself
    assert all(section["additionalProperties"] is False for section in sections)
    assert schema["$defs"]["Adapter"]["properties"]["variant"]["enum"] == plugins.names("variants")
    assert schema["$defs"]["TrainSource"]["properties"]["format"]["enum"] == ["auto", *plugins.names("formats")]
    assert schema["properties"]["model"]["anyOf"] == [{"$ref": "#/$defs/Model"}, {"type": "string", "minLength": 1}]
    assert schema["required"] == ["model"]
    assert schema["anyOf"][1] == {"required": ["tasks"]}


def test_the_schema_for_editors_takes_every_recipe_that_is_shipped_and_the_keys_of_plug_ins() -> None:
    check = Draft202012Validator(json_schema(plug_ins=True))
    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert len(recipes) > 10
    for file in recipes:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert [error.message for error in check.iter_errors(recipe)] == [], file
    drawn = {"model": {"name_or_path": "x", "task": "text-to-image", "snr_gamma": 5}, "dataset": "rows.jsonl"}
    assert check.is_valid(drawn)
    assert not check.is_valid(drawn | {"model": {**drawn["model"], "snr_gamma": 0}})
    assert not check.is_valid({"model": "x"})
    assert not check.is_valid({"model": "x", "dataset": {"val_size": 0}})
    for word, fits in (("sigmoid", True), ("kto", True), ("round", False)):  # a key of two objectives
        assert check.is_valid({"model": "x", "dataset": "rows.jsonl", "train": {"loss_type": word}}) is fits


def test_checking_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x\nlearning_rte: 1\n")
    code = (
        "import sys; from pathlib import Path; from dynlora_cli.config.load import load_recipe\n"
        "try: load_recipe(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    kind, *modules = result.stdout.split()
    assert kind == "RecipeError"
    assert {"pydantic", "yaml"} <= set(modules)
    heavy = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes", "numpy", "rich", "typer", "safetensors"}
    assert not heavy & set(modules)
