"""Keys that plug-ins bring along: read, checked and answered like any other key, and gone without them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dynlora_cli import plugins
from dynlora_cli.config.load import json_schema, to_yaml
from dynlora_cli.config.options import given, options
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


@pytest.mark.slow
def test_without_such_plug_ins_a_recipe_is_a_recipe() -> None:
    assert type(load(MINIMAL)) is Recipe
    for variant in plugins.names("variants"):
        if options("variants", variant):
            continue
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


def test_a_mode_is_switched_on_by_its_own_key(plug_in: PlugIn) -> None:
    plug_in(
        "modes", "toy-mode", '"""A toy."""\nOPTIONS = {"often": {"type": "int", "default": 1, "help": "How often."}}\n'
    )
    assert load(MINIMAL).train.toy_mode is False
    recipe = load(MINIMAL, "train.toy_mode=true", "train.often=3")
    assert (recipe.train.toy_mode, recipe.train.often) == (True, 3)
    assert problems(MINIMAL, "train.often=3") == [
        "--set train.often=3: train.often: only mode toy-mode has a use for it, and it is off"
    ]
    assert problems(MINIMAL, "train.toy_mod=true")[0].endswith("unknown key; did you mean 'toy_mode'?")


CONFLICTS = """CONFLICTS = [
    {"with": "train.compile", "why": "a toy is not compiled", "hint": "leave one of the two out"},
    {"with": "train.optimizer", "is": ["adamw_8bit", "paged_adamw_8bit"], "why": "it needs whole moments"},
    {"with": "rank.init", "is_not": "auto", "why": "it finds its own rank"},
    {"with": "model.attn_implementation", "contains": "flash", "why": "it looks at padding"},
    {"with": "adapter.loud", "while": {"adapter.shape": "flat"}, "at": "adapter.shape", "why": "a flat toy is silent"},
    {"with": "train.fused", "is": False, "at": "adapter.variant", "why": "a toy is fused"},
]
"""


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.compile=true", "train.compile: a toy is not compiled; leave one of the two out"),
        ("train.optimizer=adamw_8bit", "train.optimizer: it needs whole moments"),
        ("train.optimizer=paged_adamw", None),
        ("rank.init=16", "rank.init: it finds its own rank"),
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation: it looks at padding"),
        ("model.attn_implementation=sdpa", None),
        ("adapter.loud=true", "adapter.shape: a flat toy is silent"),
        ("train.fused=false", "adapter.variant: a toy is fused"),
    ],
)
def test_a_plug_in_says_what_it_does_not_go_with(plug_in: PlugIn, override: str, answer: str | None) -> None:
    plug_in("variants", "toy", HEAD + OPTIONS + CONFLICTS)
    if answer is None:
        assert load(MINIMAL, TOY, override)
    else:
        (problem,) = problems(MINIMAL, TOY, override)
        assert problem.partition(": ")[2] == answer
    if not override.startswith("adapter"):
        assert load(MINIMAL, override), "another variant goes with it"


@pytest.mark.parametrize(
    ("conflict", "words"),
    [
        ('{"with": "train.compil", "why": ""}', "no attribute 'compil'"),
        ('{"with": "train.compile"}', "0.why"),
        ('{"with": "train.compile", "why": "", "hnt": ""}', "0.hnt"),
    ],
)
def test_a_wrong_conflict_is_answered_to_its_author(plug_in: PlugIn, conflict: str, words: str) -> None:
    plug_in("variants", "toy", f"{HEAD}CONFLICTS = [{conflict}]\n")
    with pytest.raises(UsageError, match=f"variant toy: CONFLICTS in its file cannot be used: .*{words}"):
        load(MINIMAL, TOY)


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
    with pytest.raises(UsageError, match="--set strength=2: strength is set twice"):
        given("exporters", "toy", ["strength=1", "strength=2"])
    with pytest.raises(UsageError, match="has no option") as caught:
        given("exporters", "peft", ["x=1"])
    assert caught.value.hint == "it takes none"


def test_a_second_thread_waits_until_a_plug_in_is_complete(plug_in: PlugIn) -> None:
    """Tensors of a merge are computed by several threads, and each asks for the kind of its layer."""
    plug_in("variants", "slow", "import time\n\ntime.sleep(0.3)\nLAST = 1\n")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(plugins.load, "variants", "slow")
        while "dynlora_cli.lora.variants.slow" not in sys.modules and not first.done():
            time.sleep(0.01)
        assert plugins.load("variants", "slow").LAST == 1
