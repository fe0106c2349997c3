"""Wrong recipes: every problem at once, each with its place and in plain words."""

from __future__ import annotations

import pytest

from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Dataset, Model, TrainSource

from recipe_helpers import MINIMAL, load, problems


def test_all_problems_at_once_each_with_its_line() -> None:
    text = """\
model: {name_or_path: builtin:tiny, dtype: bf16, load_in_4bit: true, load_in_8bit: true}
dataset:
  train: [{path: a.jsonl, format: chta}]
  cutoff_len: 5
  max_length: 1_000
rank:
  budget: -3
train:
  learning_rte: 1e-5
  epochs: 1
  epochs: 2
trian: {}
"""
    assert problems(text, "sed=1", "train.max_steps=-1") == [
        "recipe.yaml:1: model.dtype: got 'bf16', must be one of: auto, float32, bfloat16, float16; "
        "write `dtype: bfloat16`",
        "recipe.yaml:1: model.load_in_8bit: 4 and 8 bits exclude each other; set one to false",
        "recipe.yaml:3: dataset.train.0.format: got 'chta', must be one of: auto, alpaca, captions, chat, "
        "classification, completion, grounded, kto, pairs, preference, scored-pairs, text; did you mean 'chat'?",
        "recipe.yaml:4: dataset.cutoff_len: `cutoff_len` is LLaMA-Factory's name; here it is `dataset.max_length`",
        "recipe.yaml:5: dataset.max_length: got '1_000', must be a whole number, at least 8; write 1000",
        "recipe.yaml:7: rank.budget: got -3, must be an average rank (a whole number from 1), a share of the start "
        "between 0 and 1, a parameter count like 2M, bytes of the file like 200kB, or auto",
        "recipe.yaml:9: train.learning_rte: unknown key; did you mean 'learning_rate'?",
        "recipe.yaml:11: train.epochs: repeated key; it is already on line 10",
        "recipe.yaml:12: trian: unknown key; did you mean 'train'?",
        "--set train.max_steps=-1: train.max_steps: got -1, must be a whole number, at least 1 or null",
        "--set sed=1: sed: unknown key; did you mean 'seed'?",
    ]


WRONG = [
    ("model.name_or_path=", "null, must be a text"),
    ("model.name_or_path=''", "a text"),
    ("model.revision=1234", "put it in quotes"),
    ("model.task=causal", "did you mean 'causal-lm'?"),
    ("model.dtype=fp32", "write `dtype: float32`"),
    ("model.dtype=int8", "one of: auto, float32"),
    ("model.load_in_4bit=yes", "true or false"),
    ("model.load_in_4bit=1", "true or false"),
    ("model.num_labels=1", "at least 2"),
    ("model.attn_implementation=fa2", "flash_attention_2"),
    ("dataset.train=[]", "a list of at least one"),
    ("dataset.train=3", "a list of at least one"),
    ("dataset.train.0.path=", "must be a text"),
    ("dataset.train.0.split=", "must be a text"),
    ("dataset.train.0.columns={prompt: 1}", "put it in quotes"),
    ("dataset.val=5", "a list"),
    ("dataset.val_size=1.0", "below 1"),
    ("dataset.val_size=-0.1", "at least 0"),
    ("dataset.max_length=7", "at least 8"),
    ("dataset.max_length=10.5", "a whole number"),
    ("dataset.overlong=raise", "write `overlong: error`"),
    ("dataset.train_on=prompt", "one of: auto"),
    ("adapter.variant=qlora", "write `variant: lora` with `model.load_in_4bit: true`"),
    ("adapter.variant=lorra", "did you mean 'lora'?"),
    ("adapter.target_modules=all", "write `target_modules: all-linear`"),
    ("adapter.target_modules=[]", "a text or a list"),
    ("adapter.target_modules=[1]", "a text or a list"),
    ("adapter.scaling=standard", "write `scaling: lora`"),
    ("adapter.alpha=0", "above 0"),
    ("adapter.dropout=1", "below 1"),
    ("adapter.dropout=-1", "at least 0"),
    ("adapter.init_weights=true", "write `init_weights: default`"),
    ("rank.init=0", "auto or a whole number, at least 1"),
    ("rank.init=all", "auto or"),
    ("rank.budget=automatic", "a parameter count like 2M, bytes of the file like 200kB, or auto"),
    ("pruning.policy=fischer", "did you mean 'fisher'?"),
    ("pruning.start=-0.1", "at least 0"),
    ("pruning.end=2", "at most 1"),
    ("pruning.lr_coupling=2", "at most 1"),
    ("pruning.events=0", "at least 1"),
    ("pruning.gauge=on", "true or false"),
    ("pruning.tolerance=0.5%", "must be a number, at least 0 or null"),
    ("pruning.tolerance=0.1", "only `rank.budget: auto` measures what its events add"),
    ("train.learning_rate=fast", "auto"),
    ("train.learning_rate=2", "at most 1"),
    ("train.epochs=0", "at least 1"),
    ("train.epochs=0.5", "a whole number"),
    ("train.epochs=true", "a whole number"),
    ("train.max_steps=0", "or null"),
    ("train.micro_batch_size=0", "at least 1"),
    ("train.gradient_accumulation_steps=0", "at least 1"),
    ("train.learning_rate=0", "above 0"),
    ("train.learning_rate=.nan", "got nan"),
    ("train.learning_rate=.inf", "got inf"),
    ("train.learning_rate=2", "at most 1"),
    ("train.learning_rate=fast", "a number"),
    ("train.lr_scheduler=cosine_with_min_lr", "write `lr_scheduler: cosine`"),
    ("train.warmup_ratio=100", "at most 1"),
    ("train.weight_decay=-1", "at least 0"),
    ("train.max_grad_norm=0", "write `max_grad_norm: null`"),
    ("train.optimizer=adamw_torch", "write `optimizer: adamw`"),
    ("train.log_steps=0", "at least 1"),
    ("train.save_steps=0", "at least 1"),
    ("train.report_to=5", "one of: tensorboard, wandb, mlflow, trackio or a list of these"),
    ("train.report_to=wnadb", "did you mean 'wandb'?"),
    ("train.report_to=[wnadb]", "did you mean 'wandb'?"),
    ("train.report_to=none", "write `report_to: []`"),
    ("eval.steps=0", "at least 1"),
    ("eval.max_samples=0", "at least 1"),
    ("eval.early_stopping_patience=0", "at least 1"),
    ("output_dir=", "a text"),
    ("seed=-1", "at least 0"),
    ("seed=4294967296", "below 4294967296"),
    ("train=5", "a section with the keys objective"),
    ("model=5", "a section with the keys name_or_path"),
    ("dataset.train.0=5", "a section with the keys path"),
]


@pytest.mark.parametrize(("override", "words"), WRONG)
def test_a_wrong_value_is_answered_in_plain_words(override: str, words: str) -> None:
    (problem,) = problems(MINIMAL, override)
    assert problem.startswith(f"--set {override}: {override.partition('=')[0]}")
    assert words in problem
    assert not {"Input", "input_value", "validation error", "pydantic", "literal"} & set(problem.split())


CONFLICTS = [
    (["model.load_in_4bit=true", "model.load_in_8bit=true"], "model.load_in_8bit", 1),
    (["adapter.variant=full", "model.load_in_4bit=true"], "model.load_in_4bit", 1),
    (["adapter.variant=full", "model.load_in_8bit=true"], "model.load_in_8bit", 1),
    (["adapter.variant=full", "model.dtype=float16"], "model.dtype", 1),
    (["adapter.variant=full", "adapter.freeze_a=true"], "adapter.freeze_a", 1),
    (["adapter.variant=full", "train.lora_plus_ratio=16"], "train.lora_plus_ratio", 1),
    (["model.num_labels=2"], "model.num_labels", 0),
    (["model.task=sequence-classification", "dataset.packing=true"], "dataset.packing", 1),
    (["dataset.val_size=0", "eval.early_stopping_patience=2"], "eval.early_stopping_patience", 1),
    (["dataset.val_size=0", "eval.steps=2"], "eval.steps", 1),
    (["dataset.reasoning=mask", "train.objective=dpo"], "dataset.reasoning", 0),
    (["dataset.reasoning=mask", "dataset.train_on=all"], "dataset.reasoning", 0),
    (["rank.init=4"], "rank.init", 0),
    (["rank.init=3", "adapter.init_weights=pissa"], "rank.init", 0),
    (["adapter.init_weights=loftq"], "adapter.init_weights", 0),
    (["adapter.init_weights=loftq", "model.load_in_8bit=true"], "adapter.init_weights", 0),
    (["adapter.init_weights=orthogonal", "adapter.variant=full"], "adapter.init_weights", 0),
    (["rank.allocation=gora", "adapter.variant=full"], "rank.allocation", 0),
    (["pruning.start=0.6"], "pruning.end", 0),
    (["pruning.start=0.3", "pruning.end=0.3"], "pruning.end", 1),
]


@pytest.mark.parametrize(("overrides", "key", "place"), CONFLICTS)
def test_settings_that_do_not_go_together(overrides: list[str], key: str, place: int) -> None:
    (problem,) = problems(MINIMAL, *overrides)
    assert problem.startswith(f"--set {overrides[place]}: {key}: ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.task=sequence-classification", "model.num_labels=3"],
        ["dataset.val_size=0", "dataset.val=[held-out.jsonl]", "eval.early_stopping_patience=2"],
        ["rank.init=8", "rank.budget=8"],
        ["rank.init=4", "rank.budget=0.5"],
        ["rank.init=4", "adapter.init_weights=pissa"],
        ["adapter.init_weights=loftq", "model.load_in_4bit=true"],
        ["adapter.init_weights=eva", "rank.allocation=sensitivity"],
        ["adapter.variant=full"],
        ["adapter.freeze_a=true", "train.lora_plus_ratio=16"],
        ["pruning.start=0", "pruning.end=1"],
    ],
)
def test_settings_that_go_together(overrides: list[str]) -> None:
    assert load(MINIMAL, *overrides) != load(MINIMAL), "accepted, and each changes something"


def test_a_conflict_with_a_wrong_value_is_not_guessed() -> None:
    (problem,) = problems(MINIMAL, "model.task=sequence-clasification", "model.num_labels=3")
    assert "model.task" in problem


def test_python_callers_meet_the_conflicts_too() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Recipe(
            model=Model(name_or_path="x", load_in_4bit=True, load_in_8bit=True),
            dataset=Dataset(train=[TrainSource(path="x")]),
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\n", ["recipe.yaml:1: model: missing; ", "recipe.yaml:1: dataset: missing; "]),
        (
            "model: {}\ndataset: {}\n",
            ["recipe.yaml:1: model.name_or_path: missing; ", "recipe.yaml:2: dataset.train: missing; "],
        ),
        ("model: x\ndataset:\n  train:\n    - split: a\n", ["recipe.yaml:4: dataset.train.0.path: missing; "]),
    ],
)
def test_missing_keys_say_what_belongs_there(text: str, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("learning_rate=1", "`learning_rate` belongs under `train`"),
        ("adapter.learning_rate=1", "`learning_rate` belongs under `train`"),
        ("dataset.path=x", "`dataset.path` is `dataset.train` here"),
        ("dataset.format=x", "`format` belongs under `dataset.train`"),
        ("train.seed=1", "`seed` belongs at the top level"),
        ("rank.policy=fisher", "`policy` belongs under `pruning`"),
        ("optimizer.lr=1", "`optimizer.lr` is torchtune's name; here it is `train.learning_rate`"),
        ("training.lora_r=1", "`lora_r` is axolotl's name; here it is `rank.budget`"),
        ("train.learning_rte=1", "unknown key; did you mean 'learning_rate'?"),
        ("trian.epochs=1", "trian: unknown key; did you mean 'train'?"),
        ("zzz=1", "zzz: unknown key"),
    ],
)
def test_unknown_keys_are_led_home(override: str, answer: str) -> None:
    (problem,) = problems(MINIMAL, override)
    assert problem.startswith(f"--set {override}: ")
    assert problem.endswith(answer)


def test_a_library_is_for_a_variant_that_chooses() -> None:
    found = "\n".join(problems(MINIMAL, "adapter.library=[out/a]"))
    assert "adapter.library" in found
    assert "variant lora does not choose among adapters" in found


@pytest.mark.parametrize(
    ("value", "words"), [("{tools: 1}", "tools is no variable to be set here"), ("{a: .inf}", "JSON")]
)
def test_variables_of_a_chat_template_that_are_none(value: str, words: str) -> None:
    (problem,) = problems(MINIMAL, f"dataset.chat_template_kwargs={value}")
    assert words in problem
