"""Sends an export to a model hub, through huggingface_hub: its address, its login, its protocol.

What leaves the machine is what the export wrote and a card, and nothing else: no checkpoint, no log, no recipe file.
Copies of settings that name folders of this machine are sent without them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.export.hub.card import Base, card
from dynlora_cli.export.hub.login import Address
from dynlora_cli.export.hub.private import clean_json, is_text, refuse_places, text_without_paths, without_paths
from dynlora_cli.models.find import is_hub_name
from dynlora_cli.models.place import Place
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.runs.folder import EXPORT_RECORD
from dynlora_cli.runs.log import RunRecord, read_run
from dynlora_cli.runs.record import RECORD
from dynlora_cli.text import counted, size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
# Of the export's own record, what others may want to know; the rest is of this machine.
_NOT_TOLD = ("ok", "command", "output_dir", "adapter", "library", "seconds")


@dataclass(frozen=True)
class Parcel:
    """Files to be sent, by their names in the repository: a file of this machine, or the content itself."""

    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def push(
    address: Address, folder: Path, summary: dict[str, Any], adapter: Adapter, place: Place | None, emit: Emit
) -> dict[str, Any]:
    """Send an export; what it is goes to the notes before anything is sent.

    Args:
        address: where to, and who may see it.
        folder: of the export.
        summary: of the export, as in export.json.
        adapter: that was exported.
        place: its base; None where it is not here.
        emit: takes notes.

    Returns:
        repo, url, private, commit, files (bytes by name).

    Raises:
        MachineError: the hub cannot be reached, or does not know who asks.
        UsageError: it refuses the repository, or there is a public one of that name, and a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _hub_errors(address, folder):
        base = _base(adapter, place, api, emit)
    parcel = pack(address.repo, folder, summary, adapter, place, base)
    total = size(sum(parcel.sizes.values()))
    seen = "public: everybody may see it" if address.public else "private"
    emit(
        note(
            f"sending {counted(len(parcel.files), 'file')}, {total}, to {api.endpoint}/{address.repo} ({seen}): "
            + ", ".join(f"{name} {size(count)}" for name, count in parcel.sizes.items())
        )
    )
    with _hub_errors(address, folder), _quiet():
        api.create_repo(address.repo, private=not address.public, exist_ok=True)
        private = bool(api.model_info(address.repo).private)
        if not private and not address.public:
            raise UsageError(f"{address.repo} is there and public; nothing was sent", "say --public if that is meant")
        operations = [CommitOperationAdd(name, content) for name, content in sorted(parcel.files.items())]
        commit = api.create_commit(address.repo, operations, commit_message=f"dynlora export --to {summary['to']}")
    url = f"{api.endpoint}/{address.repo}"
    return {"repo": address.repo, "url": url, "private": private, "commit": commit.oid, "files": parcel.sizes}


def pack(repo: str, folder: Path, summary: dict[str, Any], adapter: Adapter, place: Place | None, base: Base) -> Parcel:
    """The files of an export and its card, without anything that names a folder of this machine.

    Raises:
        DynloraError: something still does.
    """
    names = _names(adapter, place, base)
    files: dict[str, Path | bytes] = {}
    for name in summary["files"]:
        path = folder / name
        cleaned = clean_json(path, names) if name.endswith(".json") and is_text(name, path.stat().st_size) else None
        files[name] = path if cleaned is None else cleaned
    changed = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in files.items()
        if isinstance(content, bytes)
    }
    told = {key: value for key, value in summary.items() if key not in _NOT_TOLD}
    told["notes"] = [text_without_paths(one, names) for one in told.get("notes", [])]
    told = without_paths(told, names) | {"base_model": base.name, "files": summary["files"] | changed}
    files[EXPORT_RECORD] = (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
    record = _record(adapter)
    how = {"auto_class": (record.info.get("base_model") or {}).get("auto_class") or _auto_class(adapter)}
    text = card(record, base, repo, {**told, **how})
    files[CARD] = text_without_paths(text, names).encode()
    refuse_places(files, _places(adapter, place, folder))
    return Parcel(files)


def _record(adapter: Adapter) -> RunRecord:
    """What the adapter's folder says of its run; nothing for one of another tool."""
    return read_run(adapter.folder) if (adapter.folder / RECORD).is_file() else RunRecord(adapter.folder)


def _auto_class(adapter: Adapter) -> str | None:
    from dynlora_cli import plugins

    found: str | None = plugins.declared("tasks", adapter.task, "AUTO_MODEL")
    return found


def _base(adapter: Adapter, place: Place | None, api: HfApi, emit: Emit) -> Base:
    """The base as others know it, and the license that its own card names."""
    wanted: list[Any] = [place.options.name_or_path] if place else []
    record = adapter.record.get("base_model")
    wanted += [record.get("name_or_path")] if isinstance(record, dict) else []
    wanted.append(adapter.config.get("base_model_name_or_path"))
    given = [name for name in wanted if isinstance(name, str) and name]
    on_hub = next((name for name in given if is_hub_name(name)), None)
    if on_hub is None:
        name = next((n for n in given if n.startswith("builtin:")), Path(given[0]).name if given else "unknown")
        emit(note(f"the base has no name on the hub here: the card calls it {name}; or say --base ORG/NAME"))
        license_ = _license_in(place.folder / CARD) if place else None
        base = Base(name, False, license_)
    else:
        base = Base(on_hub, True, _license_on(api, on_hub) or (_license_in(place.folder / CARD) if place else None))
    if base.license is None:
        emit(note("the license of the base is not known, so the card names none"))
    return base


def _license_on(api: HfApi, name: str) -> str | None:
    """The license that a model's card on the hub names; None where the hub does not say, or not to everybody."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = api.model_info(name).card_data
    except HfHubHTTPError:
        return None
    found = getattr(data, "license", None)
    return found if isinstance(found, str) else None


def _license_in(path: Path) -> str | None:
    """The license in the metadata of a card beside a model."""
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", match[1], re.MULTILINE) if match else None
    return found[1] if found else None


def _names(adapter: Adapter, place: Place | None, base: Base) -> dict[str, str]:
    """What folders of this machine are called elsewhere."""
    named = adapter.config.get("base_model_name_or_path")
    found = {str(named): base.name} if isinstance(named, str) and named else {}
    found |= {str(adapter.folder.resolve()): adapter.folder.resolve().name}
    return found | ({str(place.folder): base.name, str(place.folder.resolve()): base.name} if place else {})


def _places(adapter: Adapter, place: Place | None, folder: Path) -> list[str]:
    """Folders of this machine that must not be named; short ones might be a word."""
    places = [adapter.folder.resolve(), folder.resolve(), Path.home(), Path.cwd()]
    places += [place.folder.resolve()] if place else []
    return [f"{place}/" if len(place.parts) < 3 else str(place) for place in places if len(place.parts) > 1]


@contextmanager
def _hub_errors(address: Address, folder: Path) -> Iterator[None]:
    """Turn what the client raises into one message."""
    kept = f"the export is in {folder}"
    try:
        yield
    except DynloraError:
        raise
    except Exception as error:  # the client has errors of its own, and those of its HTTP library
        status = getattr(getattr(error, "response", None), "status_code", None)
        cause = error.__cause__ or error  # the client wraps what went wrong with one file
        said = " ".join(f"{error} {cause if cause is not error else ''}".split())[:300]
        if status == 401:
            raise MachineError(
                f"the hub does not take the login; {kept}", "`hf auth login` with a token that may write"
            ) from error
        if status is not None and 400 <= status < 500:
            raise UsageError(
                f"the hub refuses {address.repo} ({status}): {said}; {kept}", "name another ORG/NAME"
            ) from error
        raise MachineError(f"sending to the hub failed: {type(error).__name__}: {said}; {kept}", "try again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the client."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was:
            enable_progress_bars()
