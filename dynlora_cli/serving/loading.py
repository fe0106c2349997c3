"""Which adapter a client may have loaded: an update of the library, as it was added, and nothing else on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from dynlora_cli.errors import UsageError
from dynlora_cli.library.library import ADAPTERS, Entry, Library

ONLY_FROM_LIBRARY = "adapters are loaded from the library's folder alone"


def entry_at(root: Path, path: str) -> Entry:
    """The update that a path names, its files checked.

    Args:
        root: the library's folder.
        path: NAME, adapters/NAME, or the same in full.

    Raises:
        UsageError: it is no update of this library, or not as it was added: files changed, links in it.
    """
    if "\0" in path or ".." in Path(path).parts:
        raise UsageError(f"{path!r} leads out of the library", ONLY_FROM_LIBRARY)
    # In words, not on the disk: a link is not followed to find out where it leads.
    here = Path(os.path.abspath(root))
    asked = Path(path)
    if not asked.is_absolute():
        asked = here / asked if asked.parts[:1] == (ADAPTERS,) else here / ADAPTERS / asked
    library = Library.open(root)
    entry = next((entry for entry in library.entries if here / ADAPTERS / entry.name == asked), None)
    if entry is None:
        names = ", ".join(entry.name for entry in library.entries)
        raise UsageError(f"{path!r} is no adapter of the library", f"{ONLY_FROM_LIBRARY}: {names}")
    entry.check()  # links too
    return entry
