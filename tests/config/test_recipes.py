"""Every recipe we ship loads, says what it is for, and gives a command that works on it."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from dynlora_cli.config.load import load_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "recipes").rglob("*.yaml"))
HEADINGS = ["Purpose", "Command", "Hardware", "Time", "Result"]

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def header(recipe: Path) -> dict[str, str]:
    """The five comment lines at the top: heading -> text."""
    lines = (REPOSITORY / recipe).read_text(encoding="utf-8").splitlines()[: len(HEADINGS)]
    return {heading.strip("# "): text.strip() for heading, _, text in (line.partition(":") for line in lines)}


def test_there_are_recipes():
    assert Path("recipes/quickstart.yaml") in RECIPES


@each_recipe
def test_opens_with_five_lines(recipe: Path):
    found = header(recipe)
    assert list(found) == HEADINGS
    unfinished = [heading for heading, text in found.items() if not text or text in ("TBD", "TODO")]
    assert not unfinished, "measure it, or move the recipe to recipes/untested and say so"


@each_recipe
def test_its_command_names_it_and_loads(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    program, command, path, *options = shlex.split(header(recipe)["Command"])
    assert (program, command, path) == ("dynlora", "train", recipe.as_posix())
    overrides = [value for name, value in itertools.pairwise(options) if name == "--set"]
    monkeypatch.chdir(REPOSITORY)
    loaded = load_recipe(Path(path), overrides)
    assert loaded.output_dir.startswith("out/")


def test_only_the_untested_are_untested():
    for recipe in RECIPES:
        says_so = "not run" in header(recipe)["Result"]
        assert says_so == ("untested" in recipe.parts), recipe
