"""`dynlora init`: a first recipe, for one's own rows or of another tool's configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_cli.drafts.convert import convert, summary
from dynlora_cli.drafts.starter import draft
from dynlora_cli.drafts.text import refuse_place, write_checked


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
        UsageError: the file exists, or a name leads nowhere. DataError: the rows cannot be read, or not trained on.
    """
    refuse_place(recipe, overwrite=overwrite)
    found = draft(data, model, columns)
    command = shlex.join(["dynlora", "train", str(recipe)])
    write_checked(recipe, found.text(command, f"out/{recipe.stem}"))
    rows = found.rows
    return {
        "ok": True,
        "recipe": str(recipe),
        "task": rows.task,
        "format": rows.form,
        "objective": rows.objective,
        "rows": rows.count,
        "columns": rows.source.columns,
        "val": [str(file) for file in found.val],
        "test": [str(file) for file in found.test],
        "notes": found.notes,
        "next": [f"{command} --dry-run", command],
    }


def from_file(
    path: Path,
    recipe: Path,
    *,
    tool: str | None = None,
    model: str | None = None,
    data: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a recipe that trains what a configuration of another tool trains.

    Args:
        path: the configuration.
        recipe: the file to be written.
        tool: whose it is, by the name of its importer; None: found out.
        model, data: in place of what it names.
        overwrite: replace the file.

    Raises:
        UsageError: the file exists, or the configuration cannot be read, or trains what dynlora does not.
    """
    refuse_place(recipe, overwrite=overwrite)
    converted = convert(path, tool, model, data)
    command = shlex.join(["dynlora", "train", str(recipe)])
    write_checked(recipe, converted.text(command))
    return {
        "ok": True,
        "recipe": str(recipe),
        "tool": converted.tool,
        "summary": summary(converted),
        "keys": [finding.as_data for finding in converted.findings],
        "unasked": [{"key": key, "value": value, "text": why} for key, (value, why) in converted.unasked.items()],
        "notes": [],
        "next": [f"{command} --dry-run", command],
    }
