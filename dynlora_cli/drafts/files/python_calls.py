"""What a training script or notebook gives to the calls that matter, read from its text. It is never run.

A value is taken where it is a literal, or a name that was set to one above. Anything else is named as what only a run
would tell.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError

# The end of a call's name, and the section that its arguments go to.
CALLS = {
    "from_pretrained": "model",
    "get_peft_model": "lora",
    "LoraConfig": "lora",
    "BitsAndBytesConfig": "quantization",
    "load_dataset": "data",
    "get_chat_template": "template",
    "train_on_responses_only": "responses",
}
TRAINERS = ("Trainer", "Config", "TrainingArguments")  # the section `train`
NOT_SETTINGS = ("GenerationConfig", "SamplingParams", "AutoConfig", "PretrainedConfig")


@dataclass
class Calls:
    """Arguments of calls as (section.name, value, line, part of the file), names of the calls, what was not read."""

    settings: list[tuple[str, Any, int, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    faults: list[tuple[int | None, str]] = field(default_factory=list)


class Unknown:
    """A value that only a run would tell; its text is what stands there."""

    def __init__(self, text: str) -> None:
        self.text = text if len(text) <= 60 else text[:57] + "..."

    def __repr__(self) -> str:
        return self.text


def read(text: str, path: Path) -> Calls:
    """The calls of a script or a notebook.

    Raises:
        UsageError: it is neither.
    """
    found, known = Calls(), dict[str, Any]()
    for part, code in _parts(text, path):
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            found.faults.append((getattr(error, "lineno", None), f"{part}no Python that can be read"))
            continue
        for node in _in_order(tree):
            _take(node, known, found, part)
    return found


def _parts(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The code of a file, cell by cell where it has cells; lines for the notebook or the shell are left empty."""
    if path.suffix.lower() != ".ipynb":
        yield "", text
        return
    try:
        cells = json.loads(text)["cells"]
        code = [(number, cell) for number, cell in enumerate(cells, 1) if cell.get("cell_type") == "code"]
        sources = [(number, "".join(cell.get("source") or "")) for number, cell in code]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--from {path}: no notebook that can be read", "save it again as .ipynb") from None
    for number, source in sources:
        lines = ["" if line.lstrip()[:1] in ("%", "!") else line for line in source.splitlines()]
        yield f"cell {number}, ", "\n".join(lines)


def _in_order(tree: ast.AST) -> Iterator[ast.Assign | ast.Call]:
    """Assignments and calls in the order of their lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.Call))]
    yield from sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _take(node: ast.Assign | ast.Call, known: dict[str, Any], found: Calls, part: str) -> None:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                value = _value(node.value, known)
                if not isinstance(value, Unknown):
                    known[target.id] = value
                else:
                    known.pop(target.id, None)
        return
    name = ast.unparse(node.func)[-200:]
    leaf = name.rpartition(".")[2]
    section = CALLS.get(leaf)
    if section is None and leaf.endswith(TRAINERS) and leaf not in NOT_SETTINGS:
        section = "train"
    if section is None or (section == "model" and "Tokenizer" in name) or (section == "model" and "Processor" in name):
        return
    found.names.append(name)
    names = {"model": ["model_name"], "data": ["path", "name"], "template": ["tokenizer", "chat_template"]}
    for at, argument in enumerate(node.args):
        position = (names.get(section) or [])[at : at + 1]
        if position and not isinstance(argument, ast.Starred):
            _enter(found, f"{section}.{position[0]}", _value(argument, known), argument.lineno, part)
    for keyword in node.keywords:
        if keyword.arg:
            _enter(found, f"{section}.{keyword.arg}", _value(keyword.value, known), keyword.value.lineno, part)


def _enter(found: Calls, key: str, value: Any, line: int, part: str) -> None:
    if (section := key.partition(".")[0]) in ("model", "data") and any(one[0] == key for one in found.settings):
        return  # the first model and the first data set are what is trained; later ones load what came out
    if section != "data" or not isinstance(value, Unknown):
        found.settings.append((key, value, line, part))


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """What an expression is, without running it: literals, names set to some, products of numbers, `not f()`."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, known) for item in node.elts]
        if not any(isinstance(item, Unknown) for item in items):
            return items
    return Unknown(ast.unparse(node))
