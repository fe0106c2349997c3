"""Files and folders that are there whole or not at all, also after a loss of power.

What is written lies beside its final name first, is on the disk before it is renamed, and the rename is on the disk
before anything relies on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file whole: beside its name, then renamed into place."""
    temporary = unfinished(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError):  # such as a full disk, a folder in the place of the file, half a character
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """Where a file or folder is until it is whole; what a killed process leaves there is of no use."""
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON, whole."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and keeps their names by itself
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Wait until everything in a folder is on the disk; links are left alone."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                sync(Path(path))
        sync(Path(parent))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds; no matter if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place if the block succeeds, and vanishes if it does not.

    For folders inside one that this process writes; files/place.py is for what a person names.
    """
    temporary = unfinished(path)
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_all(temporary)
        remove(path)
        os.rename(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
