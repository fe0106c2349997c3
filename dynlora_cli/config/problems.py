"""Turns pydantic's errors into sentences for the person who wrote the recipe.

What is allowed is read from the JSON schema, so that `dynlora schema` and the messages say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import ValidationError

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names, plug_in_keys
from dynlora_cli.config.schema import Path, Schema, allowed, at, present, sections, words
from dynlora_cli.config.strict_yaml import Node, Problem, dotted
from dynlora_cli.text import did_you_mean, show


def field_problems(error: ValidationError, root: Node, schema: Schema) -> dict[Path, list[Problem]]:
    """The problems of single keys, by path; settings that do not go together are left to `conflict_problems`."""
    found: dict[Path, list[Problem]] = {}
    for fault in error.errors(include_url=False):
        kind, path = fault["type"], tuple(fault["loc"])
        nodes = root.walk(path)
        if kind != "missing":
            path = path[: len(nodes) - 1]  # pydantic adds the member of a union that it tried
        if kind == "conflicts" or path in found:
            continue
        place = nodes[-1].place
        if kind == "extra_forbidden":
            texts = list(_unknown(path, nodes[-1].plain(), schema))
        elif kind == "missing":
            texts = [f"{dotted(path)}: missing; {at(schema, path)['description']}"]
        elif kind == "value_error":
            texts = [f"{dotted(path)}: {fault['ctx']['error']}"]
        else:
            texts = [f"{dotted(path)}: {_wrong_value(path, nodes[-1].plain(), at(schema, path), schema)}"]
        found[path] = [Problem(place, text) for text in texts]
    return found


def conflict_problems(error: ValidationError, root: Node, wrong: Collection[Path]) -> list[Problem]:
    """The problems of settings that do not go together, unless one of the two is wrong anyway."""
    named = {dotted(path[:depth]) for path in wrong for depth in range(1, len(path) + 1)}
    problems = []
    for fault in error.errors(include_url=False):
        for conflict in fault["ctx"]["conflicts"] if fault["type"] == "conflicts" else ():
            if not named & {conflict.key, conflict.other}:
                nodes = root.walk([int(step) if step.isdecimal() else step for step in conflict.key.split(".")])
                other = root.walk(conflict.other.split("."))
                # A default cannot be at fault: where only the other key is written, point at that line.
                node = nodes[-1] if len(nodes) >= len(other) else other[-1]
                problems.append(Problem(node.place, f"{conflict.key}: {conflict.text}"))
    return problems


def _wrong_value(path: Path, value: object, schema: Schema, whole: Schema) -> str:
    text = f"got {show(value)}, must be {allowed(schema, whole)}"
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    hint = foreign_names.value_hint(key, value)
    if hint:
        return f"{text}; {hint}"
    if isinstance(value, str):
        number = value.replace("_", "").replace(",", "")
        if number.isdecimal() and number != value:
            return f"{text}; write {number}"
        return text + did_you_mean(value, words(schema))
    if isinstance(value, int | float) and "a text" in allowed(schema, whole):
        return f"{text}; put it in quotes"
    return text


def _unknown(path: Path, value: object, schema: Schema) -> Iterator[str]:
    """Answers an unknown key, and the keys below it that are known from other tools."""
    below = list(_aliases_below(path, value))
    yield from below
    answer = foreign_names.hint(path)
    if not answer and not below:
        choices = present(at(schema, path[:-1]), schema)["properties"]
        answer = _of_a_plug_in(path) or _belongs(path, schema) or foreign_names.tool_hint(path)
        answer = answer or "unknown key" + did_you_mean(str(path[-1]), choices)
    if answer:
        yield f"{dotted(path)}: {answer}"


def _aliases_below(path: Path, value: object) -> Iterator[str]:
    for key, child in value.items() if isinstance(value, dict) else ():
        answer = foreign_names.hint((*path, key))
        if answer:
            yield f"{dotted((*path, key))}: {answer}"
        else:
            yield from _aliases_below((*path, key), child)


def _of_a_plug_in(path: Path) -> str | None:
    """The answer to a key of plug-ins that the recipe does not choose; None where no plug-in has it."""
    owners = plug_in_keys.owners(path)
    if not owners:
        return None
    here = {kind: ".".join(plugins.CHOSEN[kind]) for kind, _ in owners}
    whose = " or ".join(f"{plugins.WORDS[kind]} {name}" for kind, name in owners)
    which = " or ".join(f"`{here[kind]}: {name}`" for kind, name in owners)
    return f"a key of {whose}; write {which}, or leave it out"


def _belongs(path: Path, schema: Schema) -> str | None:
    """Where a key belongs that is known in another section."""
    key, here = path[-1], dotted([step for step in path[:-1] if isinstance(step, str)])
    for section, keys in sections(schema).items():
        if key in keys and section != here:
            return f"`{key}` belongs under `{section}`" if section else f"`{key}` belongs at the top level"
    return None
