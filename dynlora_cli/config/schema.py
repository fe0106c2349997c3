"""Questions to a JSON schema of recipes: what stands at a place, which keys a section has, what a value must be."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Path = tuple[str | int, ...]
Schema = dict[str, Any]


def allowed(schema: Schema, whole: Schema) -> str:
    """What a value must be, in words, from its JSON schema; `whole` holds the definitions."""
    if "anyOf" in schema:
        return " or ".join(
            "a list of these" if is_list_of_others(choice, schema) else allowed(choice, whole)
            for choice in sorted(schema["anyOf"], key=lambda choice: is_list_of_others(choice, schema))
        )
    schema = resolve(schema, whole)
    if "enum" in schema:
        return f"one of: {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if "properties" in schema:
        return f"a section with the keys {', '.join(schema['properties'])}"
    if schema["type"] == "array":
        least = " of at least one" if schema.get("minItems") else ""
        return f"a list{least}, each item {allowed(schema['items'], whole)}"
    names = {"string": "a text", "boolean": "true or false", "null": "null", "object": "a mapping of text to text"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    name = {"integer": "a whole number", "number": "a number", **names}[schema["type"]]
    limits = [f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema]
    return ", ".join([name, " and ".join(limits)]) if limits else name


def sections(schema: Schema) -> dict[str, Collection[str]]:
    """The keys of each section: `train`, `dataset.train`, and the top level as an empty name."""
    found: dict[str, Collection[str]] = {}

    def visit(name: str, section: Schema) -> None:
        section = present(section, schema)
        if "properties" in section:
            found[name] = section["properties"]
            for key, child in section["properties"].items():
                visit(f"{name}.{key}".lstrip("."), present(child, schema).get("items", child))

    visit("", schema)
    return found


def at(schema: Schema, path: Path) -> Schema:
    """The schema of the value at a path."""
    here = schema
    for step in path:
        section = present(here, schema)
        if isinstance(step, int):
            here = next(choice for choice in (section, *section.get("anyOf", ())) if "items" in choice)["items"]
        else:
            here = section["properties"][step] if "properties" in section else section["additionalProperties"]
    return here


def is_list_of_others(choice: Schema, schema: Schema) -> bool:
    """Whether one of the choices of a schema is a list of what another is alone."""
    return "items" in choice and choice["items"] in schema["anyOf"]


def words(schema: Schema) -> list[str]:
    """What may stand at a place where only certain words may, alone or in a list."""
    return [str(word) for choice in (schema, *schema.get("anyOf", ())) for word in choice.get("enum", ())]


def resolve(here: Schema, schema: Schema) -> Schema:
    """The definition that a `$ref` names, which may be one of a choice, as of a section that may be null."""
    choices = [here, *here.get("allOf", ()), *here.get("anyOf", ())]
    reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
    return schema["$defs"][reference.rsplit("/", 1)[1]] if reference else here


def present(here: Schema, schema: Schema) -> Schema:
    """The definition of what stands at a place that may also be null."""
    here = resolve(here, schema)
    given = [choice for choice in here.get("anyOf", ()) if choice.get("type") != "null"]
    return resolve(given[0], schema) if len(given) == 1 else here
