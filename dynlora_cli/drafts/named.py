"""A run that names a model and rows, and no recipe: the recipe that `dynlora init` would write is what runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynlora_cli.config.load import load_text, to_yaml
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.drafts.starter import BUDGET, draft, name_for
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import RECIPE


@dataclass(frozen=True)
class Named:
    """A run without a recipe file.

    Args:
        recipe: checked.
        text: the recipe, settings of the command line included, for the run folder.
        path: where it goes.
        notes: what was guessed of the rows, in sentences.
    """

    recipe: Recipe
    text: str
    path: Path
    notes: list[str]

    @property
    def again(self) -> tuple[str, ...]:
        """The words of the command that repeats the run in another folder."""
        return "train", str(self.path), "--output-dir", f"{self.recipe.output_dir}-again"


def named_run(
    model: str | None,
    dataset: str | None,
    *,
    budget: str | None = None,
    columns: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    output_dir: str | None = None,
) -> Named:
    """Make the recipe of a run.

    Args:
        model, dataset: as `--model` and `--dataset` name them.
        budget: `rank.budget`, checked; None: the usual one.
        columns: our names to the data's.
        overrides: `section.key=value` texts.
        output_dir: the run folder; None: `out/` and the data's name.

    Raises:
        UsageError: one of the two is not named, or leads nowhere, or settings are wrong.
        DataError: the rows cannot be trained on.
    """
    missing = [option for option, value in (("--model", model), ("--dataset", dataset)) if value is None]
    if model is None or dataset is None:
        example = "dynlora train --model builtin:tiny --dataset rows.jsonl"
        text = f"without a recipe, {' and '.join(missing)} must be given"
        raise UsageError(text, f"for example {example}, or dynlora train RECIPE.yaml")
    found = draft(dataset, model, columns, option="--dataset")
    folder = output_dir if output_dir is not None else f"out/{name_for(dataset)}"
    path = Path(folder) / RECIPE
    text = found.text(shlex.join(["dynlora", "train", str(path)]), folder, budget or BUDGET)
    recipe = load_text(text, str(path), overrides, output_dir)
    return Named(recipe, settled(text, str(path), overrides, output_dir), Path(recipe.output_dir) / RECIPE, found.notes)


def settled(text: str, source: str, overrides: Sequence[str], output_dir: str | None = None) -> str:
    """The text of a recipe with settings of the command line written into it, so that it trains the same without them.

    Lines that are there are changed and keep their comments; others are added. Where that would not be read back as the
    same recipe, all of it is written out instead, below the comments of the head.
    """
    wanted = load_text(text, source, overrides, output_dir)
    edited = text
    for override in overrides:
        key, _, value = override.partition("=")
        edited = _put(edited, key.strip().split("."), value.strip())
    try:
        if load_text(edited, source, (), output_dir) == wanted:
            return edited
    except UsageError:
        pass  # written out below
    head = "".join(line + "\n" for line in text.splitlines() if line.startswith("# "))
    return head + to_yaml(wanted)


def _put(text: str, path: Sequence[str], value: str) -> str:
    """The text with one key set; a line that says something about it stays, with its comment."""
    lines = text.splitlines()
    section, key = (path[0], path[1]) if len(path) == 2 else ("", path[0])
    start = 0
    if section:
        if not any(line.split("#")[0].rstrip() == f"{section}:" for line in lines):
            return f"{text}{section}:\n  {key}: {value}\n"
        start = next(at for at, line in enumerate(lines) if line.split("#")[0].rstrip() == f"{section}:") + 1
    indent = "  " if section else ""
    end = start
    while end < len(lines) and (not section or lines[end][:1] in (" ", "#")):
        if found := re.match(rf"{indent}{re.escape(key)}:(\s[^#]*)?(#.*)?$", lines[end]):
            written = f"{indent}{key}: {value}"
            lines[end] = f"{written:<34}{found[2]}" if found[2] else written
            return "\n".join(lines) + "\n"
        end += 1
    lines.insert(end, f"{indent}{key}: {value}")
    return "\n".join(lines) + "\n"
