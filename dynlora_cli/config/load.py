"""Reads a recipe: strict YAML, `--set` overrides, and every problem reported at once with its place.

Two shorthands: `model: NAME` stands for `model: {name_or_path: NAME}`, and `dataset: FILE` for
`dataset: {train: [{path: FILE}]}`. They also work after `--set`, where the section's other keys stay as they are. An
item of `dataset.train` and `dataset.val` may be just a path, and so may the whole list. `tasks` in place of
`dataset.train` names rows beside what they are about (config/task_list.py).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynlora_cli.config import strict_yaml
from dynlora_cli.config.plug_in_keys import Brought, brought, recipe_form
from dynlora_cli.config.problems import conflict_problems, field_problems
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.strict_yaml import Node, Place, Problem
from dynlora_cli.config.task_list import TASKS, write_out
from dynlora_cli.config.task_list import schema as task_schema
from dynlora_cli.errors import RecipeError
from dynlora_cli.text import show

SECTIONS = [name for name, field in Recipe.model_fields.items() if name not in ("output_dir", "seed")]
SCHEMA_HINT = "all keys and what they mean: dynlora schema"


def load_recipe(
    path: Path, overrides: Sequence[str] = (), output_dir: str | None = None, swept: Sequence[str] = ()
) -> Recipe:
    """Reads a recipe file and checks all of it.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts, applied in order; values are YAML.
        output_dir: replaces the recipe's own.
        swept: further overrides, which `--sweep` has made.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: every problem of the file and of the overrides, in the order of lines.
    """
    return load_text(strict_yaml.read_text(path), str(path), overrides, output_dir, swept)


def load_text(
    text: str, source: str, overrides: Sequence[str] = (), output_dir: str | None = None, swept: Sequence[str] = ()
) -> Recipe:
    """The same for the text of a recipe file, which need not exist yet.

    Args:
        text: YAML.
        source: the file's path, for messages and the name of the run.
        overrides, output_dir, swept: as of `load_recipe`.

    Raises:
        RecipeError: every problem.
    """
    root, problems = strict_yaml.parse(text, source)
    if root is None:
        raise RecipeError([str(problem) for problem in problems])
    if not isinstance(root.value, dict):
        found = "the file is empty" if root.value is None else f"the file holds {show(root.plain())}"
        raise RecipeError([f"{root.place}: {found}; a recipe is made of sections such as `model: NAME`"], SCHEMA_HINT)
    root.value.setdefault("output_dir", Node(f"out/{Path(source).stem}", Place(source)))
    return _checked(root, problems, overrides, output_dir, swept)


def check_recipe(
    data: Mapping[str, Any], overrides: Sequence[str] = (), output_dir: str | None = None, swept: Sequence[str] = ()
) -> Recipe:
    """The same check of a recipe that a program has made: dicts, lists and scalars, as in the file.

    Args:
        data: as YAML would hold it; paths may be `Path`s, and lists tuples.
        overrides, output_dir, swept: as of `load_recipe`.

    Raises:
        RecipeError: every problem; each names the path of its key.
    """
    root, problems = strict_yaml.from_plain(data, "recipe")
    if root is None:
        raise RecipeError([str(problem) for problem in problems], SCHEMA_HINT)
    return _checked(root, problems, overrides, output_dir, swept)


def _checked(
    root: Node, problems: list[Problem], overrides: Sequence[str], output_dir: str | None, swept: Sequence[str]
) -> Recipe:
    """The recipe of a tree, or all of its problems."""
    assert isinstance(root.value, dict)
    if not any(setting.lstrip().startswith(TASKS) for setting in (*overrides, *swept)):
        problems += write_out(root)  # first, so that an override may name a source by its number
    _spell_out(root)
    for option, settings in (("--set", overrides), ("--sweep", swept)):
        for setting in settings:
            problems += _apply(root, setting, option)
    if output_dir is not None:
        root.value["output_dir"] = Node(output_dir, Place("--output-dir"))
    problems += write_out(root)
    _spell_out(root)
    recipe, faults = _validate(root)
    problems += faults
    if recipe is None or problems:
        in_order = sorted(problems, key=lambda problem: (problem.place.line is None, problem.place.line or 0))
        raise RecipeError([str(problem) for problem in in_order], SCHEMA_HINT)
    return recipe


def check(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from plain values, such as a Python caller gives, checked like a file.

    Args:
        values: sections by name; shorthands are taken.
        source: what messages name as the place.

    Raises:
        RecipeError: every problem.
    """
    root = _node(values, Place(source))
    problems = write_out(root)
    _spell_out(root)
    recipe, faults = _validate(root)
    problems += faults
    if recipe is None or problems:
        raise RecipeError([str(problem) for problem in problems])
    return recipe


def _node(value: Any, place: Place) -> Node:
    if isinstance(value, Mapping):
        return Node({str(key): _node(child, place) for key, child in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([_node(child, place) for child in value], place)
    return Node(str(value) if isinstance(value, Path) else value, place)


def _spell_out(root: Node) -> None:
    """Writes shorthands out in full, and an empty section as one without keys."""
    sections = root.value
    assert isinstance(sections, dict)
    for name, node in sections.items():
        if node.value is None and name in SECTIONS:
            node.value = {}
    model, dataset, adapter = sections.get("model"), sections.get("dataset"), sections.get("adapter")
    if model and isinstance(model.value, str):
        model.value = {"name_or_path": Node(model.value, model.place)}
    if dataset and isinstance(dataset.value, str):
        dataset.value = {"train": Node([Node(dataset.value, dataset.place)], dataset.place)}
    if dataset and isinstance(dataset.value, dict):
        for key in ("train", "val"):
            _spell_out_list(dataset.value.get(key), "path")
    if adapter and isinstance(adapter.value, dict):
        _spell_out_list(adapter.value.get("new_tokens"), "content")


def _spell_out_list(items: Node | None, key: str) -> None:
    """Writes texts of a list, or one text in place of it, as sections with a key."""
    if items and isinstance(items.value, str):
        items.value = [Node(items.value, items.place)]
    for item in items.value if items and isinstance(items.value, list) else ():
        if isinstance(item.value, str):
            item.value = {key: Node(item.value, item.place)}


def _apply(root: Node, override: str, option: str) -> list[Problem]:
    """Puts one `section.key=value` of an option into the tree; returns what is wrong with it."""
    place = Place(f"{option} {override if len(override) <= 120 else override[:117] + '...'}")
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        return [Problem(place, "must be written section.key=value")]
    value, problems = strict_yaml.parse(text, place.source, numbered=False)
    if value is None:
        return problems
    if path == ["model"] and isinstance(value.value, str):
        path.append("name_or_path")
    if path == ["dataset"] and isinstance(value.value, str):
        path.append("train")
        value = Node([value], place)
    fault = root.assign(path, value)
    _spell_out(root)
    return [*problems, Problem(place, fault)] if fault else problems


def _validate(root: Node) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, where it is valid, and all problems of its keys and values.

    Settings that do not go together are looked for even where other keys are wrong: those are left out for it.
    """
    data = root.plain()
    form = recipe_form(data)
    try:
        return form.model_validate(data), []
    except ValidationError as error:
        wrong = field_problems(error, root, form.model_json_schema())
        clashes = error
    if wrong:
        try:
            form.model_validate(_without(data, wrong))
        except ValidationError as error:
            clashes = error
    problems = [problem for found in wrong.values() for problem in found]
    return None, problems + conflict_problems(clashes, root, wrong)


def problems_of(root: Node) -> list[tuple[str, str]]:
    """What is wrong with a recipe that a program has made, as pairs of a dotted key and what is wrong with it."""
    problems = write_out(root)
    _spell_out(root)
    _, faults = _validate(root)
    problems += faults
    split = (problem.text.partition(": ") for problem in problems)
    return [(key, text) for key, _, text in split]


def _without(data: dict[str, Any], wrong: Iterable[Sequence[str | int]]) -> dict[str, Any]:
    """The data without its wrong keys, so that the rest can be checked for conflicts.

    A list with a wrong item is left out whole. Required keys that are missing get a stand-in.
    """
    data = copy.deepcopy(data)
    for path in wrong:
        keys = [str(step) for step in itertools.takewhile(lambda step: isinstance(step, str), path)]
        section = data
        for key in keys[:-1]:
            section = section.get(key, {})
        section.pop(keys[-1], None)
    data.setdefault("model", {}).setdefault("name_or_path", "?")
    data.setdefault("dataset", {}).setdefault("train", [{"path": "?", "descriptions": ["?"]}])
    return data


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML that `load_recipe` reads back to an equal object."""
    return strict_yaml.dump(recipe.model_dump())


def json_schema(*, plug_ins: bool = False) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, shorthands included.

    Args:
        plug_ins: with the keys of all plug-ins. That one of them needs its plug-in to be chosen is left to the check.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    properties = schema["properties"]
    text = {"type": "string", "minLength": 1}
    for section in ("model", "dataset"):
        properties[section]["anyOf"] = [{"$ref": properties[section].pop("$ref")}, text]
    for section, key in (("Dataset", "train"), ("Dataset", "val"), ("Adapter", "new_tokens")):
        items = schema["$defs"][section]["properties"][key]
        items["items"] = {"anyOf": [items["items"], text]}
        whole = {key: items.pop(key) for key in ("type", "items", "minItems") if key in items}
        items["anyOf"] = [whole, text]
    properties[TASKS] = task_schema({"$ref": "#/$defs/TrainSource"})
    # The rows may be all in `tasks`, and the section has other keys.
    schema["required"].remove("dataset")
    schema["$defs"]["Dataset"]["required"].remove("train")
    has_rows = {"description": "Has rows, where there are no tasks.", "anyOf": [{"required": ["train"]}, text]}
    schema["anyOf"] = [{"required": ["dataset"], "properties": {"dataset": has_rows}}, {"required": [TASKS]}]
    if plug_ins:
        place = attrgetter("section", "key")
        for (section, key), ways in itertools.groupby(sorted(brought(), key=place), place):
            schema["$defs"][section.title()]["properties"][key] = _in_one(list(ways))
    return schema


def _in_one(ways: list[Brought]) -> dict[str, Any]:
    """The schema of a key that several plug-ins may bring, each with its own meaning."""
    said = " ".join(f"With `{way.chosen}`: {way.schema['description']}" for way in ways)
    if len(ways) == 1:
        return {**ways[0].schema, "description": said}
    return {"anyOf": [way.schema for way in ways], "description": said}


RECIPES = (".yaml", ".yml")
