"""`dynlora init`: a first recipe for one's own rows, with what most people change next as comments.

The rows are looked at, so the recipe names a task and columns that fit them; what it says is checked by the recipe's
own reader before it is written.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dynlora_cli.chat_turns import PAIRS
from dynlora_cli.data import CLASSIFICATION, fitting_formats
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.model_folder import find_model, is_hub_name
from dynlora_cli.recipe import Model, Source, load_recipe
from dynlora_cli.rows import is_local, tables
from dynlora_cli.whole_files import write_text

TEMPLATE = """\
# Purpose:  fine-tune {model} on {data} ({rows})
# Command:  dynlora train {path}
# Hardware: what it needs of memory: dynlora train {path} --dry-run
# Time:     not run yet
# Result:   not run yet
model:
  name_or_path: {model_text}
{task}  # load_in_4bit: true            # QLoRA: the base in a quarter of bf16's memory
dataset:
  train: [{source}]
  val_size: 0.05                  # held out to measure on; rows with the same prompt stay together
  max_length: 1024                # tokens; what is longer is cut, and counted
{chat}rank:
  budget: 8                       # average rank when training is done | 0.5 of the start | 2M parameters | auto
train:
  epochs: 1
  micro_batch_size: 8             # --dry-run says how many rows fit
  # gradient_checkpointing: true  # less memory, more time
  learning_rate: auto             # tries a few on the first batches; a number does without
output_dir: {output}
"""
CHAT = "  chat: auto                      # turns where the model has a chat template | true | false: bare text\n"


def run(
    data: str, recipe: Path, *, model: str, columns: Mapping[str, str] | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a recipe.

    Args:
        data: a file, folder, hub data set or the built-in one; only what is on this machine is read.
        recipe: the file to be written.
        model: a folder, a hub id or builtin:tiny; a folder must hold a model.
        columns: our names to the data's.
        overwrite: replace the file.

    Raises:
        UsageError: the file exists, a name leads nowhere, or the rows fit no format. DataError: they cannot be read.
    """
    if recipe.exists() and not overwrite:
        raise UsageError(f"{recipe} exists", "choose another name with --out, or add --overwrite")
    if recipe.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {recipe}: a recipe's name ends in .yaml", f"for example --out {recipe}.yaml")
    for name, what, example in ((data, "DATA", "rows.jsonl"), (model, "--model", "builtin:tiny")):
        if not name:
            raise UsageError(f"{what} is empty", f"name it, such as {example}")
    if not is_hub_name(model):
        find_model(Model(name_or_path=model))
    source = Source(path=data, columns=dict(columns or {}))
    notes: list[str] = []
    task, form, rows = _looked_at(source, notes) if is_local(data) else ("causal-lm", None, None)
    counted = "a hub data set, not looked at" if rows is None else f"{rows:,} rows, read as {form}"
    text = TEMPLATE.format(
        model=_comment(model),
        model_text=_scalar(model),
        data=_comment(data),
        rows=counted,
        path=_comment(shlex.quote(str(recipe))),
        task="" if task == "causal-lm" else f"  task: {task}\n",
        source=_source(source),
        chat=CHAT if task == "causal-lm" and form in PAIRS else "",
        output=_scalar(f"out/{recipe.stem}"),
    )
    recipe.parent.mkdir(parents=True, exist_ok=True)
    draft = recipe.with_name(f".{recipe.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        load_recipe(draft)
    finally:
        draft.unlink(missing_ok=True)
    write_text(recipe, text)
    command = shlex.join(["dynlora", "train", str(recipe)])
    return {
        "ok": True,
        "recipe": str(recipe),
        "task": task,
        "format": form,
        "rows": rows,
        "notes": notes,
        "next": [f"{command} --dry-run", command],
    }


def _looked_at(source: Source, notes: list[str]) -> tuple[str, str, int]:
    """Task, format and number of rows, by the columns of the first row of each table."""
    found: dict[tuple[str, str], str] = {}
    count = 0
    for table in tables(source, notes, held_out=False):
        rows = table.read()
        place, first = next(rows)  # a table without rows has raised
        missing = [theirs for theirs in source.columns.values() if theirs not in first]
        if missing:
            raise UsageError(f"--columns: {place} has no {missing[0]!r}", f"columns there: {', '.join(first)}")
        found.setdefault(_fit(place, {*first, *source.columns}), table.name)
        count += 1 + sum(1 for _ in rows)
    if len(found) > 1:
        kinds = "; ".join(f"{name}: {form}" for (_, form), name in found.items())
        raise DataError(f"{source.path}: its files hold rows of different kinds ({kinds})", "name one of the files")
    (task, form) = next(iter(found))
    return task, form, count


def _fit(place: str, columns: set[str]) -> tuple[str, str]:
    """The task and the format that rows with these columns are for."""
    # A text with a label could be learned as text, but whoever labels it wants a classifier.
    tasks = (CLASSIFICATION, "causal-lm") if "label" in columns else ("causal-lm", CLASSIFICATION)
    for task in tasks:
        for form in fitting_formats(task, columns):
            return task, form.__name__.rpartition(".")[2]
    raise DataError(
        f"{place}: the columns {', '.join(sorted(columns))} fit no format",
        "say which is which, ours to theirs, such as --columns prompt=question,completion=answer",
    )


def _source(source: Source) -> str:
    columns = ", ".join(f"{ours}: {_scalar(theirs)}" for ours, theirs in source.columns.items())
    return f"{{path: {_scalar(source.path)}" + (f", columns: {{{columns}}}" if columns else "") + "}"


def _comment(text: str) -> str:
    """Text that stays on the line of its comment."""
    return " ".join(text.split())


def _scalar(text: str) -> str:
    """Text as YAML: as it is where that is read back, in quotes elsewhere."""
    if re.fullmatch(r"[A-Za-z./~][\w./~:-]*", text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()
