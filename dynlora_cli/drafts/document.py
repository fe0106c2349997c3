"""The recipe of `dynlora adapt`: what documents say, learned by a model that had them in its prompt."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from dynlora_cli import plugins
from dynlora_cli.config.load import load_text
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.drafts.named import settled
from dynlora_cli.drafts.text import comment, scalar
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import RECIPE

ROWS, HELD_OUT = "rows.jsonl", "held_out.jsonl"  # in the run folder
BUDGET = "8"
TEMPLATE = """\
# Purpose:  what {documents} says, without it in the prompt of {model}
# Command:  {command}
# Hardware: what it needs of memory: {command} --dry-run
# Time:     not run yet
# Result:   not run yet
model:
  name_or_path: {model_text}
dataset:
  train: [{{path: {rows}, format: grounded}}]
  val: [{{path: {held_out}, format: grounded}}]
  max_length: {length}
rank:
  budget: {budget:<23} # average rank when training is done | 0.5 of the start | 2M parameters | 200kB | auto
train:
  objective: context-distillation # the teacher is the model itself, with the document in its prompt
  epochs: {epochs:<23} # passes over the rows, so many that there are some forty steps at least
  micro_batch_size: 8
  learning_rate: 2e-3             # auto: a guess, checked by the run's first steps
eval:
  steps: {steps:<24} # optimizer steps between two looks at the held-out rows
output_dir: {output}
"""
LENGTH, EVAL_STEPS = 2048, 20
# Measured with a model of 135M parameters on documents of some hundred tokens (scripts/bench/generated): fewer steps
# leave most of the document unlearned, and so does half of that rate; twice the rate gains nothing.
EPOCHS, LEAST_STEPS = 12, 40


def with_enough_steps(recipe: Recipe, text: str, rows: int) -> tuple[Recipe, str]:
    """The recipe and its text with more passes, where the rows are so few that the usual ones are too few steps.

    Args:
        recipe, text: as of `document_recipe`.
        rows: that are trained on.
    """
    at_once = recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps
    epochs = ceil(LEAST_STEPS / ceil(rows / at_once))
    if recipe.train.max_steps is not None or recipe.train.epochs != EPOCHS or epochs <= EPOCHS:
        return recipe, text
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})
    return longer, settled(text, RECIPE, [f"train.epochs={epochs}"])


def _refuse_settled(recipe: Recipe, as_drafted: Recipe) -> None:
    """Refuse changes of what the command itself is about, before rows are written."""
    settled_keys = (
        ("output_dir", recipe.output_dir != as_drafted.output_dir, "--out says where the adapter goes"),
        (
            "model.name_or_path",
            recipe.model.name_or_path != as_drafted.model.name_or_path,
            "--model says which base is asked and trained",
        ),
        (
            "train.objective",
            recipe.train.objective != as_drafted.train.objective,
            "`adapt` teaches what the model says with the document in its prompt; for others: dynlora train",
        ),
        (
            "adapter.variant",
            plugins.declared("variants", recipe.adapter.variant, "hypernet"),
            f"{recipe.adapter.variant} is a network that writes adapters: `dynlora train` trains it",
        ),
    )
    for key, changed, why in settled_keys:
        if changed:
            raise UsageError(f"--set {key}: {why}", f"leave --set {key} out")


def document_recipe(
    model: str,
    documents: Sequence[str],
    out: Path,
    *,
    budget: str = BUDGET,
    changes: Sequence[str] = (),
) -> tuple[Recipe, str]:
    """The recipe of a run on rows that are yet to be written, checked, and its text for the run folder.

    Args:
        model: as it was named.
        documents: their names.
        out: the run folder, which will hold the rows.
        budget: `rank.budget`, as YAML.
        changes: `section.key=value` texts.

    Raises:
        UsageError: a change is wrong, or names other rows or another output folder.
    """
    path = out / RECIPE
    named = documents[0] if len(documents) == 1 else f"{documents[0]} and {len(documents) - 1} more"
    text = TEMPLATE.format(
        documents=comment(named),
        model=comment(model),
        command=comment(shlex.join(["dynlora", "train", str(path)])),
        model_text=scalar(model),
        rows=scalar(str(out / ROWS)),
        held_out=scalar(str(out / HELD_OUT)),
        length=LENGTH,
        budget=budget,
        epochs=EPOCHS,
        steps=EVAL_STEPS,
        output=scalar(str(out)),
    )
    recipe = load_text(text, str(path), changes)
    as_drafted = load_text(text, str(path))
    for key in ("train", "val"):
        if getattr(recipe.dataset, key) != getattr(as_drafted.dataset, key):
            raise UsageError(
                f"--set dataset.{key}: the rows of `adapt` are those that are written about the documents",
                "for rows of your own about them use --data; else train on them: dynlora train",
            )
    _refuse_settled(recipe, as_drafted)
    return recipe, settled(text, str(path), changes)
