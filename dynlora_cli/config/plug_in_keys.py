"""Keys of a recipe that come from plug-ins: the options of those that the recipe chooses (config/options.py).

An option becomes a key of the section in which its plug-in is chosen: that of a variant, say, a key of `adapter`. A
recipe whose plug-ins declare no options is a plain `Recipe`. For any other, `recipe_form` makes a class under `Recipe`
that has the further keys, so that code reads `recipe.adapter.strength` like any other key.

Modes are not chosen but switched on, each by a key of `train`. Their keys are there whether they are on or off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import Field, create_model

from dynlora_cli import plugins
from dynlora_cli.config.options import Option, misdeclared, options, section
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Train
from dynlora_cli.config.types import Section


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
        for kind, (where, _) in plugins.CHOSEN.items()
        for name in plugins.names(kind)
        if len(path) == 2 and path[0] == where and path[1] in options(kind, name)
    ]


@dataclass(frozen=True)
class Brought:
    """A key that a plug-in adds to a section.

    Attributes:
        section: of the recipe, such as `adapter`.
        chosen: what brings it, such as `variant: t-lora`.
        key: its name.
        schema: what may be written, as JSON Schema.
    """

    section: str
    chosen: str
    key: str
    schema: dict[str, Any]


def brought() -> list[Brought]:
    """The keys of all plug-ins that a recipe can choose.

    Raises:
        UsageError: a plug-in declares its options wrongly.
    """
    found = []
    for kind, (where, chooser) in plugins.CHOSEN.items():
        for name in plugins.names(kind):
            own = options(kind, name)
            fields = section(own).model_json_schema().get("properties", {})
            found += [Brought(where, f"{chooser}: {name}", key, fields[key]) for key in own]
    return found


def _keys(values: Mapping[str, Any]) -> dict[str, dict[str, Option]]:
    """The keys that plug-ins add, by section."""
    found: dict[str, dict[str, Option]] = {where: {} for where, _ in plugins.CHOSEN.values()}
    for kind, (where, key) in plugins.CHOSEN.items():
        name = _chosen(values, where, key)
        if name in plugins.names(kind):
            _add(found, where, kind, name, options(kind, name))
    for name in plugins.names("modes"):
        _add(found, "train", "modes", name, _switch(name) | options("modes", name))
    return found


def _switch(mode: str) -> dict[str, Option]:
    """The key that switches a mode on, where it is none of those that every recipe has."""
    key = plugins.switch(mode)
    if key in Train.model_fields:
        return {}
    return {key: Option(type="bool", default=False, help=f"Switches the mode {mode} on.")}


def _chosen(values: Mapping[str, Any], where: str, key: str) -> Any:
    """What plain values say at a key; its default where they say nothing."""
    plain = values.get(where)
    if isinstance(plain, Section):
        return getattr(plain, key, plugins.OBJECTIVE)
    field = type_of(Recipe, where).model_fields.get(key)
    return (plain if isinstance(plain, Mapping) else {}).get(key, field.default if field else plugins.OBJECTIVE)


def _add(found: dict[str, dict[str, Option]], where: str, kind: str, name: str, own: dict[str, Option]) -> None:
    """Adds the options of a plug-in to the keys of its section."""
    try:
        section(own, type_of(Recipe, where))
        if twice := sorted(found[where].keys() & own):
            raise ValueError(f"another plug-in brings `{twice[0]}` as well")
    except ValueError as error:
        raise misdeclared(kind, name, "OPTIONS", str(error)) from None
    found[where] |= own


@cache  # so that two recipes with the same keys are of the same class, and can be equal
def _form(keys: tuple[tuple[str, tuple[tuple[str, Option], ...]], ...]) -> type[Recipe]:
    fields: dict[str, Any] = {}
    for name, added in keys:
        form, field = section(dict(added), type_of(Recipe, name)), Recipe.model_fields[name]
        default = ... if field.is_required() else form()
        fields[name] = (form, Field(default=default, description=field.description))
    return create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, __module__=Recipe.__module__, **fields)
