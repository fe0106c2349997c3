"""Text of a recipe: names and comments written so that they are read back, and the check before a file is written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from dynlora_cli.config.load import RECIPES, load_text
from dynlora_cli.config.sections import Source
from dynlora_cli.errors import UsageError
from dynlora_cli.files.whole import write_text


def refuse_place(recipe: Path, *, overwrite: bool) -> None:
    """Check that a recipe may be written to a file.

    Raises:
        UsageError: the file exists, or is not named as a recipe is.
    """
    if recipe.exists() and not overwrite:
        raise UsageError(f"{recipe} exists", "choose another name with --out, or add --overwrite")
    if recipe.suffix not in RECIPES:
        raise UsageError(f"--out {recipe}: a recipe's name ends in .yaml", f"for example --out {recipe}.yaml")


def write_checked(recipe: Path, text: str) -> None:
    """Write a recipe that its own reader takes.

    Raises:
        UsageError: it does not; nothing is written.
    """
    load_text(text, str(recipe))
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, text)


def source_text(source: Source) -> str:
    columns = ", ".join(f"{ours}: {scalar(theirs)}" for ours, theirs in source.columns.items())
    return f"{{path: {scalar(source.path)}" + (f", columns: {{{columns}}}" if columns else "") + "}"


def comment(text: str) -> str:
    """Text that stays on the line of its comment, with the signs made visible that YAML does not take."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(text.split()))


def flow(value: Any) -> str:
    """A list, a mapping, a number or a text as YAML in one line: JSON, with escapes where YAML takes no sign bare."""
    shown = json.dumps(value, ensure_ascii=False)
    return "".join(sign if sign.isprintable() else f"\\U{ord(sign):08x}" for sign in shown)


def scalar(text: str) -> str:
    """Text as YAML: as it is where that is read back, in quotes elsewhere."""
    if re.fullmatch(r"[A-Za-z./~][\w./~:-]*", text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()
