"""Keys that plug-ins bring along: read, checked and answered like any other key, and gone without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynlora_cli import plugins
from dynlora_cli.config.load import json_schema, to_yaml
from dynlora_cli.config.options import given
from dynlora_cli.config.plug_in_keys import recipe_form, section_form
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import UsageError

from recipe_helpers import MINIMAL, load, problems

PlugIn = Callable[[str, str, str], Path]
HEAD = '"""A toy."""\n\nhas_components = True\ntakes = ("alpha",)\n'
OPTIONS = """OPTIONS = {
    "strength": {"type": "float", "default": 0.5, "above": 0, "at_most": 2, "help": "How strong."},
    "turns": {"type": "int", "default": 3, "at_least": 1, "help": "How often."},
    "shape": {"type": "choice", "choices": ["flat", "round"], "default": "flat", "help": "How it looks."},
    "note": {"type": "str", "default": None, "help": "A remark."},
    "loud": {"type": "bool", "default": False, "help": "Whether it is heard."},
}
"""
TOY = "adapter.variant=toy"


@pytest.fixture
def toy(plug_in: PlugIn) -> Path:
    return plug_in("variants", "toy", HEAD + OPTIONS)


def test_without_such_plug_ins_a_recipe_is_a_recipe() -> None:
    assert type(load(MINIMAL)) is Recipe
    for variant in plugins.names("variants"):
        assert recipe_form({"adapter": {"variant": variant}}) is Recipe


def test_an_option_is_a_key_of_the_section(toy: Path) -> None:
    plain = json_schema()
    recipe: Any = load(MINIMAL, TOY, "adapter.strength=2", "adapter.turns=1e1", "adapter.note=x")
    adapter = recipe.adapter
    assert (adapter.strength, adapter.turns, adapter.shape, adapter.note, adapter.loud) == (2, 10, "flat", "x", False)
    assert isinstance(recipe, Recipe)
    assert load(to_yaml(recipe)) == recipe
    assert load(to_yaml(recipe)) != load(MINIMAL, TOY)
    assert load(MINIMAL, "adapter.variant=lora") == load(MINIMAL)
    assert json_schema() == plain


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strength=0", "got 0, must be a number, above 0 and at most 2"),
        ("strength=much", "got 'much', must be a number, above 0 and at most 2"),
        ("turns=0", "got 0, must be a whole number, at least 1"),
        ("turns=1.5", "got 1.5, must be a whole number, at least 1"),
        ("shape=rund", "got 'rund', must be one of: flat, round; did you mean 'round'?"),
        ("note=5", "got 5, must be a text or null; put it in quotes"),
        ("loud=1", "got 1, must be true or false"),
        ("strenght=1", "unknown key; did you mean 'strength'?"),
    ],
)
def test_a_wrong_option_is_answered_as_any_key(toy: Path, override: str, words: str) -> None:
    key = override.partition("=")[0]
    assert problems(MINIMAL, TOY, f"adapter.{override}") == [f"--set adapter.{override}: adapter.{key}: {words}"]


def test_an_option_of_another_plug_in_says_whose_it_is(toy: Path, plug_in: PlugIn) -> None:
    words = "a key of variant toy; write `adapter.variant: toy`, or leave it out"
    assert problems(MINIMAL, "adapter.strength=1") == [f"--set adapter.strength=1: adapter.strength: {words}"]
    plug_in("variants", "toy-two", HEAD + OPTIONS)
    (problem,) = problems(MINIMAL, "adapter.loud=true")
    assert problem.endswith(
        "a key of variant toy or variant toy-two; write `adapter.variant: toy` or `adapter.variant: toy-two`, or leave it out"
    )


@pytest.mark.parametrize(("kind", "section"), [("policies", "pruning"), ("tasks", "model"), ("objectives", "train")])
def test_every_kind_has_its_section(plug_in: PlugIn, kind: str, section: str) -> None:
    plug_in(kind, "toy", '"""A toy."""\n' + OPTIONS)
    key = {"policies": "policy", "tasks": "task", "objectives": "objective"}[kind]
    recipe = load(MINIMAL, f"{section}.{key}=toy", f"{section}.strength=1")
    assert getattr(recipe, section).strength == 1
    record = recipe.model_dump(mode="json")
    assert recipe_form(record).model_validate(record) == recipe
    assert section_form(section, record[section]).model_validate(record[section]) == getattr(recipe, section)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('{"x": {"type": "flot", "default": 1, "help": ""}}', "x.type"),
        ('{"x": {"type": "int", "default": 1}}', "x.help"),
        ('{"x": {"type": "int", "default": 1, "help": "", "over": 3}}', "x.over"),
        ('{"x": {"type": "int", "default": 1, "help": "", "above": 1}}', "the default of x"),
        ('{"x": {"type": "choice", "default": "a", "help": ""}}', "`choices`"),
        ('{"a b": {"type": "int", "default": 1, "help": ""}}', "'a b' cannot be a key"),
        ('{"alpha": {"type": "int", "default": 1, "help": ""}}', "`alpha` means something else already"),
        ('{"names_experts": {"type": "int", "default": 1, "help": ""}}', "`names_experts` means something else"),
        ("{'x': {'type': 'int', 'default': max(1, 2), 'help': ''}}", "OPTIONS is read without running the file"),
        ("{", "no Python"),
    ],
)
def test_a_wrong_declaration_is_answered_to_its_author(plug_in: PlugIn, options: str, words: str) -> None:
    plug_in("variants", "toy", f"{HEAD}OPTIONS = {options}\n")
    with pytest.raises(UsageError) as caught:
        load(MINIMAL, TOY)
    assert words in caught.value.message
    assert "toy" in caught.value.message
    assert caught.value.hint


def test_options_on_the_command_line(plug_in: PlugIn) -> None:
    plug_in("exporters", "toy", '"""A toy."""\n' + OPTIONS)
    options: Any = given("exporters", "toy", ["strength=1", "note='5'"])
    assert (options.strength, options.turns, options.note) == (1, 3, "5")
    for text, words in {
        "strenght=1": "exporter toy has no option 'strenght'; did you mean 'strength'?",
        "strength": "must be written KEY=VALUE",
        "strength=9": "got 9, must be a number, above 0 and at most 2",
        "turns=[": "--set turns=[",
    }.items():
        with pytest.raises(UsageError) as caught:
            given("exporters", "toy", [text])
        assert words in caught.value.message
    with pytest.raises(UsageError, match="has no option") as caught:
        given("exporters", "peft", ["x=1"])
    assert caught.value.hint == "it takes none"
