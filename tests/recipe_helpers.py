"""Loads recipes that are given as text, with plug-ins of known content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import RecipeError

MINIMAL = "model: builtin:tiny\ndataset: rows.jsonl\n"


def load(text: str, *overrides: str, output_dir: str | None = None) -> Recipe:
    """The recipe of a file recipe.yaml with this text."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides, output_dir)


def problems(text: str, *overrides: str) -> list[str]:
    """All problems of a recipe that must be refused; places read recipe.yaml:LINE."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.message == "\n".join(caught.value.problems)
    return [problem.replace(str(path), path.name) for problem in caught.value.problems]


def schema_keys(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of the recipe's JSON schema with its dotted path; the items of a list have the path of the list."""

    def visit(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        for choice in (*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
            yield from visit(path, choice)
        for key, child in node.get("properties", {}).items():
            name = f"{path}.{key}".lstrip(".")
            yield name, child
            yield from visit(name, child)

    yield from visit("", schema)
