"""Plug-ins: folders whose file names are the names used in recipes. Adding one file adds one choice.

lora/variants/      how a layer uses its components          adapter.variant
pruning/policies/   which components to keep                 pruning.policy
adapters/kinds/     how an adapter's files are written          a variant's `saved_as`
data/formats/       how a row of data becomes an example     dataset.train[].format
export/targets/     files that other tools read              dynlora export --to
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.text import did_you_mean

FOLDERS = {
    "variants": "lora.variants",
    "policies": "pruning.policies",
    "formats": "data.formats",
    "kinds": "adapters.kinds",
    "exporters": "export.targets",
}


def names(drawer: str) -> list[str]:
    """Names that a drawer offers, sorted, without importing any of the files; `_` in a file name is `-` in a name."""
    return sorted(_files(drawer))


def _files(drawer: str) -> dict[str, Path]:
    """Name to file, of every folder that belongs to the drawer's package."""
    folders = importlib.import_module(f"dynlora_cli.{FOLDERS[drawer]}").__path__
    files = [path for folder in folders for path in Path(folder).glob("*.py") if not path.stem.startswith("_")]
    return {path.stem.replace("_", "-"): path for path in files}


def load(drawer: str, name: str) -> ModuleType:
    """The module `dynlora_cli/<drawer>/<name>.py`.

    Raises:
        UsageError: the drawer has no such file.
    """
    if name not in names(drawer):
        raise UsageError(
            f"{drawer} has no {name!r}{did_you_mean(name, names(drawer))}", f"choose one of: {', '.join(names(drawer))}"
        )
    return importlib.import_module(f"dynlora_cli.{FOLDERS[drawer]}.{name.replace('-', '_')}")


def declared(drawer: str, name: str, constant: str) -> Any:
    """What `dynlora_cli/<drawer>/<name>.py` sets a constant to, without importing it; None where it does not."""
    for node in ast.parse(_files(drawer)[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [constant]:
            return ast.literal_eval(node.value)
    return None
