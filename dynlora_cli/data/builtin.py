"""`builtin:stdlib-docs`: a real, offline data set made from the docstrings of the Python that runs dynlora.

A row asks for the first sentence of a docstring, given the signature:

    prompt      json.dumps(obj, *, skipkeys=False, ...)
                What it does:
    completion   Serialize obj to a JSON formatted str.

Source files are parsed, never imported. About one row in twenty is held out, by a hash of the completion: prompts are
unique, and what shares its answer (overloads, re-implementations of one method) stays on one side. The hash knows no
seed and no row order, so a row keeps its side from one Python version to the next.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dynlora_cli.errors import MachineError

SCHEMA = 1  # part of the cache's file name: raise it when rows change
HELD_OUT = 20  # one row in this many
TEMPLATE = "{signature}\nWhat it does:"
_MIN_ROWS = 500
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings"}
_SKIPPED |= {"ensurepip", "pydoc_data", "lib-dynload", "this.py", "antigravity.py"}
_SENTENCE = re.compile(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?])(?:\s|$)")

Row = dict[str, str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def rows(split: Literal["train", "val"]) -> list[Row]:
    """Rows of one split, each with `prompt` and `completion`.

    Raises:
        MachineError: this Python comes without the sources of its standard library.
    """
    return [row for row in _cached() if _held_out(row) == (split == "val")]


def _held_out(row: Row) -> bool:
    digest = hashlib.sha256(row["completion"].casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def cache_file() -> Path:
    """Where the rows of this Python version are kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.implementation.name}-{'.'.join(map(str, sys.version_info[:3]))}"
    return root / "dynlora" / f"stdlib-docs-{version}-{SCHEMA}.jsonl"


def _cached() -> list[Row]:
    path = cache_file()
    try:
        made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(made) >= _MIN_ROWS and all(row.keys() == {"prompt", "completion"} for row in made):
            return made
    except (OSError, ValueError, AttributeError):
        pass  # absent, unreadable or damaged: the rows are simply made anew
    made = make(Path(sysconfig.get_paths()["stdlib"]))
    if len(made) < _MIN_ROWS:
        raise MachineError(
            f"builtin:stdlib-docs: this Python's standard library holds only {len(made)} usable docstrings",
            "its sources may not be installed; name a data file in dataset.train instead",
        )
    _write(path, made)
    return made


def _write(path: Path, made: list[Row]) -> None:
    """Write the cache in one move; a folder that cannot be written costs the next run a few seconds, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        os.replace(file.name, path)
    except OSError:
        return


def make(folder: Path) -> list[Row]:
    """All rows of the Python sources below a folder, in a fixed order, each prompt and each answer of a name once."""
    made: dict[str, Row] = {}
    seen: set[tuple[str, str]] = set()
    for path in _sources(folder):
        module = ".".join(path.relative_to(folder).parts).removesuffix(".py").removesuffix(".__init__")
        for signature, sentence in _documented(path, module):
            prompt = TEMPLATE.format(signature=signature)
            leaf = signature.partition("(")[0].rpartition(".")[2]
            if prompt not in made and (leaf, sentence) not in seen:
                seen.add((leaf, sentence))
                made[prompt] = {"prompt": prompt, "completion": " " + sentence}
    return list(made.values())


def _sources(folder: Path) -> Iterator[Path]:
    """Files of public modules, sorted; tests and private packages are not even walked into."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("_"))
        for name in sorted(files):
            public = name == "__init__.py" or not name.startswith("_")
            if name.endswith(".py") and public and name not in _SKIPPED:
                yield Path(parent, name)


def _documented(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Signature and first sentence of every public definition of a file that has both in a sane length."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library are not the user's concern
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # a template or another encoding: not a module of this Python
        return
    for name, node in _definitions(tree, module):
        sentence = first_sentence(ast.get_docstring(node) or "")
        signature = name + _arguments(node)
        if sentence and len(signature) <= 160:
            yield signature, sentence


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods with their qualified names, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}.{child.name}")


def _arguments(node: Definition) -> str:
    """`(a, b=1)` without annotations and without self; a class shows those of its `__init__`."""
    if isinstance(node, ast.ClassDef):
        starts = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
        start = next(starts, None)
        return _arguments(start) if start else ""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    positional = node.args.posonlyargs or node.args.args
    if positional and positional[0].arg in ("self", "cls"):
        del positional[0]
    return f"({ast.unparse(node.args)})"


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring as one clean line of 12 to 200 characters, or an empty string."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    line = " ".join(paragraph.replace("``", "").replace("`", "").split())
    found = _SENTENCE.match(line)
    sentence = found[1] if found else line + "."
    clean = (
        sentence.isprintable() and sentence[0].isalpha() and not re.search(r">>>|->|::|https?:|^\w[\w.]*\(", sentence)
    )
    return sentence if clean and 12 <= len(sentence) <= 200 else ""
