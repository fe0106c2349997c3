"""Makes the parts of docs/ that are not written by hand, from the tool itself and from recorded runs.

    python scripts/make_docs.py                       all of it; tests/test_docs.py fails where a file is not fresh
    python scripts/make_docs.py --run out/quickstart  first takes the picture of the README from this run

recipe-reference.md   every key of a recipe, from the schema, and which settings exclude each other, found by trying
commands.md           the help of every command
performance.md        its tables, and those of benchmarks.md, from the tables in scripts/bench; see docs_tables.py
pictures/             see docs_pictures.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from docs_pictures import components_svg, ranks_svg, schedule_svg, take_run, terminal_svg
from docs_tables import BLOCKS, cell, table
from pydantic import ValidationError

from dynlora_cli.cli.app import app
from dynlora_cli.config.load import json_schema
from dynlora_cli.config.plug_in_keys import brought, recipe_form
from dynlora_cli.config.schema import is_list_of_others

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUN = DOCS / "pictures" / "quickstart.json"
MADE = "<!-- made by scripts/make_docs.py; do not edit -->\n"

Schema = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder of recipes/quickstart.yaml")
    arguments = parser.parse_args()
    if arguments.run:
        run = take_run(arguments.run)
        RUN.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        # Not among the files that are made anew each time: another version of rich draws other boxes.
        (DOCS / "pictures" / "terminal.svg").write_text(terminal_svg(run), encoding="utf-8")
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    run = json.loads(RUN.read_text(encoding="utf-8"))
    pages: dict[Path, str] = {}
    for (page, block), make in BLOCKS.items():
        path = DOCS / page
        pages[path] = with_block(pages.get(path) or path.read_text(encoding="utf-8"), block, make())
    return pages | {
        DOCS / "recipe-reference.md": recipe_reference(),
        DOCS / "commands.md": command_reference(),
        DOCS / "pictures" / "ranks.svg": ranks_svg(run),
        DOCS / "pictures" / "components.svg": components_svg(),
        DOCS / "pictures" / "schedule.svg": schedule_svg(run),
        DOCS / "pictures" / "quality.svg": (ROOT / "scripts/bench/quality.svg").read_text(encoding="utf-8"),
        DOCS / "pictures" / "real.svg": (ROOT / "scripts/bench/real.svg").read_text(encoding="utf-8"),
    }


def with_block(page: str, name: str, text: str) -> str:
    """The page with the text between `<!-- name -->` and `<!-- end of name -->` replaced."""
    start, end = f"<!-- {name}: made by scripts/make_docs.py -->\n", f"<!-- end of {name} -->\n"
    before, rest = page.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"


# The recipe, from its schema.


def recipe_reference() -> str:
    schema = json_schema()
    parts = [MADE, "# Every key of a recipe\n", INTRODUCTION]
    top = []
    for name, field in schema["properties"].items():
        section = section_of(schema, field)
        if section is None:
            top.append((name, field))
            continue
        parts.append(f"## {name}\n\n{field['description']}\n")
        parts.append(key_table(section))
        if name == "dataset":
            source, added = schema["$defs"]["Source"], schema["$defs"]["TrainSource"]["properties"]["weight"]
            parts.append(f"### An item of dataset.train or dataset.val\n\n{source['description']}\n")
            weighed = {**source, "properties": {**source["properties"], "weight": added}}
            parts.append(key_table(weighed) + "\n`weight` is a key of `dataset.train` alone.\n")
        if name == "eval":
            also = schema["$defs"]["Also"]
            parts.append(f"### An item of eval.also\n\n{also['description']}\n")
            parts.append(key_table(also))
        for key, value in section["properties"].items():
            if "anyOf" in value and (inner := section_of(schema, value)):
                parts.append(f"### {name}.{key}\n\n{inner['description']}\n")
                parts.append(key_table(inner))
    parts.insert(3, "## At the top\n\n" + table(["key", "value", "default", "what it does"], map(row_of_top, top)))
    parts.append(plug_in_section())
    parts.append(conflict_section())
    return "\n".join(parts)


PLUG_INS = """## Keys that come with a choice

Some variants, tasks, objectives and policies bring keys of their own. They stand in the section in which the choice is made,
and are refused without it.
"""


def plug_in_section() -> str:
    parts = [PLUG_INS]
    for (section, chosen), keys in itertools.groupby(brought(), lambda each: (each.section, each.chosen)):
        parts.append(f"### {section}: {{{chosen}}}\n\n{key_table({'properties': {k.key: k.schema for k in keys}})}")
    return "\n".join(parts)


INTRODUCTION = """A recipe needs `model` and `dataset`. Everything else has a default. `dynlora schema` prints the same as a
JSON Schema, for editors. [How to write a recipe](recipes.md) begins with what you want instead of with the keys.

The key `budget` under the heading `rank` is written `rank: {budget: 4}`, on the command line `--set rank.budget=4`.
"""


def row_of_top(item: tuple[str, Schema]) -> list[str]:
    name, field = item
    return [f"`{name}`", kind(field), default_of(field, False), cell(field["description"])]


def section_of(schema: Schema, field: Schema) -> Schema | None:
    """The section that a top-level key holds; None for a plain value."""
    for option in [field, *field.get("anyOf", [])]:
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rpartition("/")[2]]
    return None


def key_table(section: Schema) -> str:
    required = section.get("required", [])
    rows = (
        [f"`{name}`", kind(field), default_of(field, name in required), cell(field["description"])]
        for name, field in section["properties"].items()
    )
    return table(["key", "value", "default", "what it does"], rows)


def kind(field: Schema) -> str:
    """What may be written: the choices, or the type and its bounds."""
    if "enum" in field:
        return cell(" | ".join(f"`{choice}`" for choice in field["enum"]))
    if "anyOf" in field:
        options = sorted(field["anyOf"], key=lambda option: is_list_of_others(option, field))
        kinds = ("list of these" if is_list_of_others(option, field) else kind(option) for option in options)
        return cell(" | ".join(dict.fromkeys(text.replace(r"\|", "|") for text in kinds)))
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return {"Also": "set of rows", "Source": "source", "TrainSource": "source"}.get(name, "keys below")
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}"
    if field.get("type") == "boolean":
        return cell("`true` | `false`")
    names = {"string": "text", "object": "mapping of names", "null": "`null`"}
    return names.get(field.get("type", ""), field.get("type", "")) + bounds(field)


def bounds(field: Schema) -> str:
    """`, at least 1` and the like."""
    if "pattern" in field:
        return " such as `5%`" if "%" in field["pattern"] else " such as `2M` or `200kB`, or `auto`"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return "".join(f", {word} {field[key]:,}" for key, word in words.items() if key in field)


def default_of(field: Schema, required: bool) -> str:
    if required:
        return "required"
    return f"`{json.dumps(field.get('default'), ensure_ascii=False)}`" if "default" in field else ""


# Settings that exclude each other, found by trying every pair on the check itself.

# Values that matter, and that no schema can name.
VALUES = {
    "adapter.target_modules": ["experts"],
    "dataset.val_size": [0],
    "model.attn_implementation": ["flash_attention_2"],
    "rank.budget": ["auto"],
}
CONFLICTS = """## What does not go together

Each line is an answer of the check: found by trying every setting alone and every pair of settings. A run is refused with
the same words, before anything is loaded.
"""


def conflict_section() -> str:
    groups: dict[tuple[tuple[str, ...], str], list[set[str]]] = {}
    for settings, text in conflicts():
        keys = tuple(key for key, _ in settings)
        values = groups.setdefault((keys, general(text, settings)), [set() for _ in keys])
        for seen, (_, value) in zip(values, settings, strict=True):
            seen.add(json.dumps(value))
    rows = []
    for (keys, text), values in sorted(groups.items()):
        written = [f"`{key}: {', '.join(sorted(seen))}`" for key, seen in zip(keys, values, strict=True)]
        rows.append([*written, *[""] * (2 - len(written)), cell(text)])
    return CONFLICTS + "\n" + table(["this", "with this", "answer"], rows)


def general(text: str, settings: tuple[tuple[str, Any], ...]) -> str:
    """The answer without the value that it repeats, so that like answers share a line."""
    for key, value in settings:
        if key == "adapter.variant":
            text = text.replace(f"variant {value} ", "this variant ")
        if key == "model.task":
            text = text.replace(f"{value} knows", "this task knows").replace(f"with {value}", "with this task")
        if key == "dataset.train_on":
            text = text.removeprefix(f"got {value}; ")
        if key == "rank.allocation":
            text = text.replace(f"start as {value}", "start so")
        if key == "adapter.init_weights":
            text = text.replace(f"as {value};", "so;")
    return text


def conflicts() -> Iterator[tuple[tuple[tuple[str, Any], ...], str]]:
    """Every setting, or pair of settings of different keys, that the check refuses; a pair only for its own sake."""
    settings = list(choices())
    alone = {setting_id(setting): set(refusals(setting)) for setting in settings}
    for setting in settings:
        for text in sorted(alone[setting_id(setting)]):
            yield (setting,), text
    for first, second in itertools.combinations(settings, 2):
        if first[0] != second[0]:
            known = alone[setting_id(first)] | alone[setting_id(second)]
            for text in sorted(set(refusals(first, second)) - known):
                yield (first, second), text


def setting_id(setting: tuple[str, Any]) -> str:
    return json.dumps(setting)


def choices() -> Iterator[tuple[str, Any]]:
    """Key and value, for every value but the default that a key can be tried with."""
    schema = json_schema()
    for name, field in schema["properties"].items():
        section = section_of(schema, field)
        for key, of_section in (section or {"properties": {}})["properties"].items():
            path = f"{name}.{key}"
            for value in VALUES.get(path) or samples(of_section):
                if value != of_section.get("default", ...):
                    yield path, value


def samples(field: Schema) -> list[Any]:
    """A few values that a field allows: every choice, and a number."""
    if "enum" in field:
        return list(field["enum"])
    if "anyOf" in field:
        return [value for option in field["anyOf"] for value in samples(option)]
    if field.get("type") == "boolean":
        return [True, False]
    if field.get("type") == "integer":
        return [max(2, field.get("minimum", 2))]
    if field.get("type") == "number":
        return [0.5]
    return []


def refusals(*settings: tuple[str, Any]) -> list[str]:
    """What the check says of a recipe with nothing but these settings."""
    recipe: Schema = copy.deepcopy({"model": {"name_or_path": "m"}, "dataset": {"train": [{"path": "d"}]}})
    for key, value in settings:
        section, _, name = key.partition(".")
        recipe.setdefault(section, {})[name] = value
    try:
        recipe_form(recipe).model_validate(recipe)
    except ValidationError as error:
        return [conflict.text for found in error.errors() for conflict in found["ctx"]["conflicts"]]
    return []


# The commands, from their help.


def command_reference() -> str:
    parts = [MADE, "# Every command and its options\n", "What `--help` prints, command by command.\n"]
    for name, command in every_command(typer.main.get_command(app)):
        with command.make_context(f"dynlora {name}", [], resilient_parsing=True, terminal_width=100) as context:
            parts.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def every_command(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and commands, those of a group behind the group itself."""
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if hasattr(command, "commands"):
            yield from every_command(command, f"{before}{name} ")


if __name__ == "__main__":
    sys.exit(main())
