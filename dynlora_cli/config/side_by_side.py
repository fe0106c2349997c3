"""Which recipes can train side by side on one frozen base. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dynlora_cli import plugins
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.resume import flat
from dynlora_cli.errors import RecipeError
from dynlora_cli.text import show

APART = "train it with a command of its own, or change that"
# Of `train`: what a pass through the base is like, which there is one of.
OF_THE_PASS = ("fused", "gradient_checkpointing")
# What says how the base's passes are run, in a way that knows one adapter alone.
MODES = {
    "compile": "compiled blocks hold one adapter",
    "cuda_graphs": "recorded passes hold one adapter",
    "shard_base": "the base is cut for several processes",
}
# Trackers that know one run in a process.
ONE_RUN = ("wandb", "mlflow", "trackio")


def refuse_apart(recipes: Mapping[str, Recipe]) -> None:
    """Check that the rows of all these runs can go through one base together.

    Args:
        recipes: by what a person calls each of them.

    Raises:
        RecipeError: every reason why they cannot.
    """
    problems = [*_shared_folders(recipes), *_differences(recipes)]
    for name, recipe in recipes.items():
        problems += [f"{name}: {key}: {why}" for key, why in _obstacles(recipe)]
    if problems:
        raise RecipeError(problems, f"runs side by side share each pass through one frozen base: {APART}")


def _shared_folders(recipes: Mapping[str, Recipe]) -> Iterator[str]:
    """Runs that would write into one folder."""
    owners: dict[Path, str] = {}
    for name, recipe in recipes.items():
        other = owners.setdefault(Path(recipe.output_dir).resolve(), name)
        if other != name:
            yield f"{name}: output_dir: {recipe.output_dir} is that of {other} as well; each run needs its own"


def _differences(recipes: Mapping[str, Recipe]) -> Iterator[str]:
    """Keys that have to be equal, and are not."""
    (first, as_first), *others = ((name, _of_the_base(recipe)) for name, recipe in recipes.items())
    for name, values in others:
        for key, value in values.items():
            if value != as_first[key]:
                yield f"{name}: {key}: {show(value)} here and {show(as_first[key])} in {first}; it has to be the same"


def _of_the_base(recipe: Recipe) -> dict[str, object]:
    """What all runs have to share, as dotted keys."""
    of_the_pass = {f"train.{key}": getattr(recipe.train, key) for key in OF_THE_PASS}
    return {**flat(recipe.model.model_dump(mode="json"), "model"), **of_the_pass}


def _obstacles(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What keeps a recipe from training beside others, as (key, reason)."""
    model, adapter, train = recipe.model, recipe.adapter, recipe.train
    if model.task != "causal-lm":
        yield "model.task", f"{model.task} trains alone; side by side trains causal-lm"
    if model.load_in_8bit:
        yield "model.load_in_8bit", "a layer in 8 bits keeps its state for one model; load_in_4bit works"
    if train.objective != plugins.OBJECTIVE:
        yield "train.objective", f"{train.objective} makes passes of its own; side by side trains {plugins.OBJECTIVE}"
    if not plugins.declared("variants", adapter.variant, "has_components"):
        yield "adapter.variant", f"{adapter.variant} has no components of its own beside a frozen base"
    if adapter.names_experts:
        yield "adapter.target_modules", "experts see some of the tokens, whose runs they do not know"
    if adapter.new_tokens:
        yield "adapter.new_tokens", "they change the tables of tokens, which all runs share"
    if adapter.dropout and train.gradient_checkpointing:
        yield "adapter.dropout", "with train.gradient_checkpointing the second pass would draw other numbers"
    for key, why in MODES.items():
        if getattr(train, key):
            yield f"train.{key}", why
    for tracker in ONE_RUN:
        if tracker in train.report_to:
            yield "train.report_to", f"{tracker} follows one run in a process; tensorboard follows several"
