"""Keys of a recipe that come from plug-ins: the options of those that the recipe chooses (config/options.py).

An option of a variant is a key of the section `adapter`, where the variant is chosen too; and so on, see `CHOSEN`. A
recipe whose plug-ins declare no options is a plain `Recipe`. For any other, `recipe_form` makes a class under `Recipe`
that has the further keys, so that code reads `recipe.adapter.strength` like any other key.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import Field, create_model

from dynlora_cli import plugins
from dynlora_cli.config.options import Option, options, section
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.types import Section
from dynlora_cli.errors import UsageError

# Section and key that choose a plug-in, by its kind.
CHOSEN = {
    "tasks": ("model", "task"),
    "variants": ("adapter", "variant"),
    "policies": ("pruning", "policy"),
    "objectives": ("train", "objective"),
}
OBJECTIVE = "sft"  # the only one that dynlora brings: `train.objective` is a key where there is another


def recipe_form(values: Mapping[str, Any]) -> type[Recipe]:
    """The class that a recipe with these plain values, right or wrong, is checked by.

    Raises:
        UsageError: a plug-in declares its options wrongly.
    """
    found = {name: tuple(keys.items()) for name, keys in _keys(values).items() if keys}
    return _form(tuple(found.items())) if found else Recipe


def section_form(name: str, values: Mapping[str, Any]) -> type[Section]:
    """The class that one section with these plain values is checked by."""
    return type_of(recipe_form({name: values}), name)


def type_of(recipe: type[Recipe], name: str) -> type[Section]:
    """The class of a recipe's section."""
    form = recipe.model_fields[name].annotation
    assert isinstance(form, type)
    return form


def owners(path: tuple[str | int, ...]) -> list[tuple[str, str]]:
    """Kind and name of the plug-ins that have a key, whether they are chosen or not."""
    return [
        (kind, name)
        for kind, (where, _) in CHOSEN.items()
        for name in plugins.names(kind)
        if len(path) == 2 and path[0] == where and path[1] in options(kind, name)
    ]


def _keys(values: Mapping[str, Any]) -> dict[str, dict[str, Option]]:
    """The keys that plug-ins add, by section."""
    found: dict[str, dict[str, Option]] = {where: {} for where, _ in CHOSEN.values()}
    objectives = plugins.names("objectives")
    if set(objectives) - {OBJECTIVE}:
        found["train"]["objective"] = Option(
            type="choice", choices=tuple(objectives), default=OBJECTIVE, help="What is learned from the rows."
        )
    for kind, (where, key) in CHOSEN.items():
        name = _chosen(values, where, key)
        if name in plugins.names(kind):
            _add(found[where], kind, name, Recipe.model_fields[where].annotation)
    return found


def _chosen(values: Mapping[str, Any], where: str, key: str) -> Any:
    """What plain values say at a key; its default where they say nothing."""
    plain = values.get(where)
    if isinstance(plain, Section):
        return getattr(plain, key, OBJECTIVE)
    field = type_of(Recipe, where).model_fields.get(key)
    return (plain if isinstance(plain, Mapping) else {}).get(key, field.default if field else OBJECTIVE)


def _add(found: dict[str, Option], kind: str, name: str, base: Any) -> None:
    """Adds the options of a plug-in to the keys of its section."""
    own = options(kind, name)
    try:
        section(own, base)
        if twice := sorted(found.keys() & own):
            raise ValueError(f"another plug-in brings `{twice[0]}` as well")
    except ValueError as error:
        message = f"{plugins.WORDS[kind]} {name}: OPTIONS in its file cannot be used: {error}"
        raise UsageError(message, "mend the plug-in") from None
    found |= own


@cache  # so that two recipes with the same keys are of the same class, and can be equal
def _form(keys: tuple[tuple[str, tuple[tuple[str, Option], ...]], ...]) -> type[Recipe]:
    fields: dict[str, Any] = {}
    for name, added in keys:
        form, field = section(dict(added), type_of(Recipe, name)), Recipe.model_fields[name]
        default = ... if field.is_required() else form()
        fields[name] = (form, Field(default=default, description=field.description))
    return create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, __module__=Recipe.__module__, **fields)
