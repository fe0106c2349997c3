"""Plug-ins: folders whose file names are the names used in recipes. Adding one file adds one choice.

lora/variants/       how a layer uses its components           adapter.variant
pruning/policies/    which components to keep                  pruning.policy
tasks/kinds/         what a model is for                       model.task
tasks/objectives/    what is learned from the rows             train.objective
execution/modes/     how the same training step is run         a key of train
data/formats/        how a row of data becomes an example      dataset.train[].format
adapters/kinds/      how an adapter's files are written        a variant's `saved_as`
models/linears/      what is asked of a base's linear layers   found by the layer's class
merging/methods/     how several adapters become one           dynlora merge --method
export/targets/      files that other tools read               dynlora export --to
routing/routers/     which adapter answers a request           --router
drafts/importers/    configurations of other tools             dynlora init --from
hypernets/kinds/     networks that write adapters from texts   the variant of the same name

Nobody imports a plug-in: `load` finds it by its name. What the command line has to know of it before that, such as its
own options (config/options.py), it writes as a literal, which `declared` reads from the text of the file.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.text import did_you_mean

FOLDERS = {
    "variants": "lora.variants",
    "policies": "pruning.policies",
    "tasks": "tasks.kinds",
    "objectives": "tasks.objectives",
    "modes": "execution.modes",
    "formats": "data.formats",
    "kinds": "adapters.kinds",
    "methods": "merging.methods",
    "linears": "models.linears",
    "exporters": "export.targets",
    "routers": "routing.routers",
    "importers": "drafts.importers",
    "hypernets": "hypernets.kinds",
}
# What one plug-in of a kind is called in messages.
WORDS = {
    "variants": "variant",
    "policies": "policy",
    "tasks": "task",
    "objectives": "objective",
    "modes": "mode",
    "formats": "format",
    "kinds": "kind of adapter",
    "methods": "merge method",
    "linears": "kind of linear layer",
    "exporters": "exporter",
    "routers": "router",
    "importers": "importer",
    "hypernets": "hypernetwork",
}
# Section and key of a recipe that choose a plug-in. A mode is switched on by a key of its own: see `switch`.
CHOSEN = {
    "tasks": ("model", "task"),
    "variants": ("adapter", "variant"),
    "policies": ("pruning", "policy"),
    "objectives": ("train", "objective"),
}
OBJECTIVE = "sft"  # what is taken where a recipe names none


def switch(mode: str) -> str:
    """The key of the section `train` that switches a mode on: its name, or what its file says."""
    return declared("modes", mode, "KEY") or mode.replace("-", "_")


def names(kind: str) -> list[str]:
    """Names of the plug-ins of a kind, sorted, without importing any; `_` in a file name is `-` in a name."""
    return sorted(_files(kind))


def _files(kind: str) -> dict[str, Path]:
    """Name to file, of every folder that belongs to the kind's package."""
    folders = importlib.import_module(f"dynlora_cli.{FOLDERS[kind]}").__path__
    return _in_folders(tuple((folder, os.stat(folder).st_mtime_ns) for folder in folders))


@cache  # asked dozens of times for a recipe; the times say whether a file has come or gone
def _in_folders(folders: tuple[tuple[str, int], ...]) -> dict[str, Path]:
    files = [path for folder, _ in folders for path in Path(folder).glob("*.py") if not path.stem.startswith("_")]
    return {path.stem.replace("_", "-"): path for path in files}


def load(kind: str, name: str) -> ModuleType:
    """The module of a plug-in.

    Raises:
        UsageError: there is none of that name.
    """
    module = f"dynlora_cli.{FOLDERS[kind]}.{name.replace('-', '_')}"
    # Layers ask for their kind in every merge of a tensor. A module that another thread is still importing is in
    # sys.modules, too, without all that it will have; import_module waits for it.
    there = sys.modules.get(module)
    if there is not None and not getattr(there.__spec__, "_initializing", False):
        return there
    if name not in names(kind):
        raise UsageError(
            f"{kind} has no {name!r}{did_you_mean(name, names(kind))}", f"choose one of: {', '.join(names(kind))}"
        )
    return importlib.import_module(module)


def declared(kind: str, name: str, constant: str, default: Any = None) -> Any:
    """What a plug-in's file sets a constant to, read without importing it; `default` where it sets no such constant.

    Raises:
        UsageError: the file is no Python, or the constant is set to something that only running the file could tell.
    """
    path = _files(kind)[name]
    about = os.stat(path)
    text = _text(path, about.st_mtime_ns, about.st_size)
    if constant not in text:
        return default
    for target, value in _parsed(path, text):
        if target == constant:
            try:
                return ast.literal_eval(value)
            except ValueError:
                raise UsageError(
                    f"{path}:{value.lineno}: {constant} is read without running the file, so it must be written out",
                    "write a literal: texts, numbers, True, False, None, and lists, tuples and dicts of them",
                ) from None
    return default


@cache  # time and size say whether the file has changed
def _text(path: Path, _changed: int, _size: int) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _parsed(path: Path, text: str) -> list[tuple[str, ast.expr]]:
    try:
        return list(_assignments(ast.parse(text)))
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: no Python: {error.msg}", "mend this plug-in, or remove it") from None


def target(task: str, objective: str | None = None) -> str:
    """What a loss is the mean over, in words: token, row, pair."""
    of_objective = declared("objectives", objective, "TARGET") if objective in names("objectives") else None
    return of_objective or declared("tasks", task, "TARGET") or "token"


def loss_in(task: str, objective: str | None = None) -> str:
    """What a loss on held-out rows is in: `nats per token`, or what a task's file says in place of nats."""
    return f"{declared('tasks', task, 'LOSS_IN', 'nats')} per {target(task, objective)}"


def unit(objective: str | None) -> str | None:
    """What an objective's losses in training are in; None: in nats, as those on held-out rows are."""
    return declared("objectives", objective, "UNIT") if objective in names("objectives") else None


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The constants of a module and their values, of `A = 1`, `A: int = 1` and `A, B = 1, 2`."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(map(ast.unparse, target.elts), node.value.elts, strict=False)
                else:
                    yield ast.unparse(target), node.value
