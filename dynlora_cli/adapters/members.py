"""The adapters that `adapter.library` of a recipe names, found without torch: a wrong path is answered at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.find import ROUTER, config_in, find_adapter
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.names import A_NAME, is_name
from dynlora_cli.runs.folder import RECORD, read_record

KEY = "adapter.library"
LIBRARY = "library.json"


def find_members(folders: Sequence[str], out: Path) -> dict[str, Path]:
    """The folders of the adapters, by name, in the order in which the recipe names them.

    Args:
        folders: as in the recipe; a library folder stands for all that is in it.
        out: the run's output folder.

    Raises:
        UsageError: one holds no adapter or one that is a router itself, two have one name or are of different bases,
            there is only one, or the new run would replace it.
    """
    found: dict[str, Path] = {}
    for named in folders:
        path = Path(named)
        for folder in _in_library(path) if (path / LIBRARY).is_file() else [find_adapter(path, KEY)[0]]:
            if out.resolve() in (folder.resolve(), *folder.resolve().parents):
                raise UsageError(
                    f"{KEY}: {folder} lies in the output folder {out}, which the new run would replace",
                    "name another folder in output_dir",
                )
            name = _name_of(folder)
            if name.lower() in {other.lower() for other in found}:
                raise UsageError(f"{KEY}: two adapters are called {name}; the other is {folder}", "rename a folder")
            found[name] = folder
    if len(found) < 2:
        raise UsageError(f"{KEY}: there is one adapter, {next(iter(found))}, and it takes several", "name another one")
    _refuse_several_bases(found)
    return found


def _in_library(path: Path) -> list[Path]:
    """The adapters of a library folder, by the names in library.json."""
    entries = read_object(path / LIBRARY).get("entries")
    names = [entry.get("name") for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    if not names or not all(isinstance(name, str) and is_name(name) for name in names):
        raise UsageError(f"{KEY}: the library {path} holds no adapters", "add some: dynlora library add")
    return [find_adapter(path / "adapters" / str(name), KEY)[0] for name in names]


def _name_of(folder: Path) -> str:
    """Of the library's entry or of the run's folder, else of the folder; a checkpoint is called as its run."""
    if (folder / ROUTER).is_file() or _kind(folder) == "XLORA":
        raise UsageError(f"{KEY}: {folder} is a router over adapters itself", "name the adapters")
    in_library = (folder.parent.parent / LIBRARY).is_file()
    recorded = read_record(folder).get("name") if (folder / RECORD).is_file() and not in_library else None
    name = str(recorded or folder.resolve().name)
    if not is_name(name):
        raise UsageError(f"{KEY}: {folder} is called {name!r}, and a name is {A_NAME}", "rename the folder")
    return name


def _kind(folder: Path) -> str:
    return str(config_in(folder).get("peft_type")).upper()


def _refuse_several_bases(found: Mapping[str, Path]) -> None:
    """Compare the fingerprints of the bases, as far as the records tell."""
    first: tuple[str, Any] | None = None
    for name, folder in found.items():
        record = read_record(folder) if (folder / RECORD).is_file() else {}
        fingerprint = ((record.get("base_model") or {}).get("fingerprint") or {}).get("sha256")
        if fingerprint and first and first[1] != fingerprint:
            raise UsageError(f"{KEY}: {first[0]} and {name} are adapters of different base models", "leave one out")
        if fingerprint and first is None:
            first = name, fingerprint
