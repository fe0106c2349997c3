"""`dynlora library`: updates put in, looked at, taken out, and calibrated. Only what computes loads torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.config.load import RECIPES
from dynlora_cli.config.sections import Source
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import UsageError
from dynlora_cli.library.library import LIBRARY, Entry, Library, library_for_writing
from dynlora_cli.retrieval.encoders import BASE, encoder_folder, full_name

if TYPE_CHECKING:
    from dynlora_cli.library.addition import Addition
    from dynlora_cli.library.calibrate import Wanted
    from dynlora_cli.library.learn import Calibration

Tell = Callable[[str], None]


def add(root: Path, wanted: Addition, tell: Tell) -> dict[str, Any]:
    """Put an update into a library.

    Raises:
        DynloraError: with the exit code that fits; the library is as it was.
    """
    from dynlora_cli.library.add import add as put
    from dynlora_cli.models.quiet import quiet

    with quiet:
        entry, notes = put(root, wanted, tell)
    library = Library.open(root)
    notes.append(
        "the library is not calibrated: until it is, the nearest update answers, which is a guess"
        if library.calibration is None
        else "it came after the calibration and stays off until the library is calibrated again"
    )
    return {
        "ok": True,
        "command": "library add",
        "library": str(root),
        "update": _described(library, entry),
        "notes": notes,
    }


def show(root: Path) -> dict[str, Any]:
    """What is in a library, and whether its files are what was put in.

    Raises:
        UsageError: it is none, or a link leads out of it.
    """
    library = Library.open(root)
    updates = [_described(library, entry) | {"damage": entry.damage()} for entry in library.entries]
    form = library.form.model_dump()
    return {
        "ok": not any(update["damage"] for update in updates),
        "command": "library list",
        "library": str(root),
        "base": form["base"],
        "encoder": form["encoder"],
        "calibrated": library.calibration is not None,
        "updates": updates,
        "notes": _unsettled(library),
    }


def _unsettled(library: Library) -> list[str]:
    if (name := library.pending) is None:
        return []
    return [
        f"{name or 'an update'} is being added or removed, or was when a process was killed: then the next command "
        "that writes puts that in order"
    ]


def remove(root: Path, name: str) -> dict[str, Any]:
    """Take an update out of a library, with everything that came with it.

    Raises:
        UsageError: there is no such library or update, or another process writes to it.
    """
    Library.open(root).entry(name)
    with library_for_writing(root) as library:
        size = library.entry(name).bytes
        seen = library.remove(name)
        left = [entry.name for entry in library.entries]
    lost = seen and bool(left)
    notes = (
        ["the calibration had learned from it and went with it: calibrate again, until then all stay off"]
        if lost
        else []
    )
    found = {"ok": True, "command": "library remove", "library": str(root), "removed": name, "bytes": size}
    return found | {"left": left, "calibration_removed": seen, "notes": notes}


def calibrate(root: Path, wanted: Wanted, tell: Tell) -> tuple[dict[str, Any], Calibration]:
    """Learn which update helps on what; library.json and report.html get it.

    Returns:
        The summary, as --json prints it, and the calibration.

    Raises:
        DynloraError: with the exit code that fits; the library is as it was.
    """
    with library_for_writing(root):  # that the result could not be kept is said before minutes of work
        pass
    from dynlora_cli.library.calibrate import calibrate as learn
    from dynlora_cli.models.quiet import quiet

    with quiet:
        learned, notes = learn(root, wanted, tell)
    found = {"ok": True, "command": "library calibrate", "library": str(root)}
    return found | {"calibration": learned.as_dict(), "notes": notes}, learned


def refuse_early(root: Path, wanted: Addition) -> None:
    """What the disk alone can say against an update, before anything heavy loads.

    Raises:
        UsageError, MachineError, DataError: as `add` itself would.
    """
    _refuse_known(root, wanted.name, wanted.encoder)
    if wanted.data is not None and wanted.data.suffix.lower() in RECIPES:
        raise UsageError(f"--data {wanted.data} is a recipe, not a file of rows", "name the rows themselves")
    for path, option in ((wanted.data, "--data"), (wanted.documents, "--documents")):
        if path is not None and not path.exists():
            raise UsageError(f"{option} {path} does not exist", "paths start at the current folder")
        if path is not None:
            tables(Source(path=str(path)), [], held_out=False)
    if wanted.encoder not in (None, BASE):
        encoder_folder(str(wanted.encoder))


def _refuse_known(root: Path, name: str | None, encoder: str | None) -> None:
    """The same, of what is in the library already."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"the library {root} is a file", "name a folder")
    if not (root / LIBRARY).is_file():
        return
    library = Library.open(root)
    if name is not None:
        library.refuse_taken(name)
    if encoder is not None and library.encoder and library.encoder.name != full_name(encoder):
        raise UsageError(
            f"--encoder {encoder}: the keys of {root} are made by {library.encoder.name}",
            "leave --encoder out, or make a new library",
        )


def _described(library: Library, entry: Entry) -> dict[str, Any]:
    """An update, as --json prints it."""
    form = entry.form
    return {
        "name": entry.name,
        "folder": str(entry.folder),
        "date": entry.date,
        "trained": form.trained,
        "tags": entry.tags,
        "keys": entry.keys,
        "held_out": entry.held_out,
        "bytes": entry.bytes,
        "calibrated": entry.name in library.seen,
        "card": form.card.model_dump(),
        "sources": [origin.model_dump() for origin in entry.sources],
        "sha256": entry.sha256,
        "data_sha256": entry.data_sha256,
    }
