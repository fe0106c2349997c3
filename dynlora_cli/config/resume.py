"""How the run in a folder stands, and whether it can be resumed with a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from dynlora_cli.config import strict_yaml
from dynlora_cli.config.plug_in_keys import recipe_form
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import ResumeForm, fits
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.log import read_run

Standing = Literal["new", "anew", "go on", "finished"]
SAID = 3  # keys at most that a hint names

# What may differ when a run is resumed: it changes what is shown and kept, not what is learned.
FREE_ON_RESUME = (
    "output_dir",
    "dataset.cache",
    "dataset.workers",
    "eval.samples",
    "train.cuda_graphs",
    "train.ddp_timeout",
    "train.log_steps",
    "train.save_steps",
    "train.report_to",
)


def same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume with a recipe that would train something else.

    Raises:
        UsageError: it would, or there is no run in that folder, or its record or its logs are damaged.
    """
    record, path = run_folder.read_record(folder), folder / run_folder.RECORD
    read_run(folder)
    if record.get("prune") and not record.get("recipe"):
        raise UsageError(f"{folder} was pruned after training; there is no training to go on with", "train anew")
    fits(ResumeForm, record, path)
    # Read by today's rules: keys that are younger than the run have the values that they had in its time.
    before = flat(fits(recipe_form(record["recipe"]), record["recipe"], path).model_dump(mode="json"))
    now = flat(recipe.model_dump(mode="json"))
    free = (*FREE_ON_RESUME, "train.epochs") if recipe.train.max_steps is not None else FREE_ON_RESUME
    differing = [key for key in now | before if before.get(key) != now.get(key) and not key.startswith(free)]
    if differing:
        lines = "\n".join(f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in sorted(differing))
        raise UsageError(
            f"the run in {folder} was made by another recipe:\n{lines}",
            f"resume with the recipe it was made by{_by_options(differing, before)}, or start a new run in another "
            "folder",
        )


def standing_of(folder: Path, recipe: Recipe, *, overwrite: bool, resume: bool) -> Standing:
    """How one of several runs stands, which are begun or gone on with by one command.

    Returns:
        "new"; "go on" from its checkpoint; "finished"; "anew", since what is there is to be replaced, or was killed
        before it had saved anything.

    Raises:
        UsageError: its folder holds something else, a run of another recipe, or damaged checkpoints alone.
    """
    if not resume or not (folder / run_folder.RECORD).is_file():
        run_folder.refuse_occupied(folder, overwrite=overwrite)
        return "anew" if overwrite else "new"
    same_recipe(folder, recipe)
    record, steps = run_folder.read_record(folder), run_folder.step_folders(folder)
    if "summary" in record:
        return "finished"
    if any(run_folder.fault_of(step, record) is None for step in steps):
        return "go on"
    if steps:
        raise UsageError(f"{folder}: none of its checkpoints is as it was written", f"remove {folder} to train it anew")
    return "anew"


def _by_options(differing: list[str], before: dict[str, Any]) -> str:
    """The options that say what a few keys were then; nothing where there are many, or one was no plain value."""
    if len(differing) > SAID or any(isinstance(before.get(key, {}), list | dict) for key in differing):
        return ""
    said = (f"{key}={_in_yaml(before[key])}" for key in sorted(differing))
    return f" ({' '.join(f'--set {shlex.quote(text)}' for text in said)})"


def _in_yaml(value: Any) -> str:
    """A plain value as a recipe's line would hold it."""
    return strict_yaml.dump({"": value}).partition(":")[2].strip()


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for name, child in tree.items() for k, v in flat(child, f"{path}.{name}".strip(".")).items()}
