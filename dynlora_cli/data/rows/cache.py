"""Rows that are read once and kept as columns for later runs: `dataset.cache`.

    ~/.cache/dynlora/rows/
      KEY/            what the rows depend on, as one hash (rows/key.py)
        about.json    how many rows each source has, and what reading them told
        train/ val/   the columns of each list (rows/stored.py), and what was made of them since
      .KEY.tmp/       is being written; it takes its name when it is whole
      KEY.lock        held by who writes it
      files/          hashes of files, by their dates

Nothing half made is ever read. The folder keeps within a size: those go first whose last use is longest ago.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dynlora_cli.data.chat.template import template_name
from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.read import Reader, Told, read_source
from dynlora_cli.data.rows.blocks import COLUMNS, TOKENS, Block
from dynlora_cli.data.rows.kept import Kept
from dynlora_cli.data.rows.key import key_of
from dynlora_cli.data.rows.stored import Files, StoredRows, Writer
from dynlora_cli.data.rows.team import Team
from dynlora_cli.data.sources import Table, tables
from dynlora_cli.errors import DataError, MachineError, UsageError
from dynlora_cli.files.place import FULL, refuse_full_disk
from dynlora_cli.files.whole import sync_all, write_json
from dynlora_cli.text import counted, size

FOLDER, MOST = "DYNLORA_CACHE", "DYNLORA_CACHE_GB"
LARGE = 32 * 10**6  # bytes of files from which rows are kept, where the recipe leaves it open
_DEFAULT_GB = 50.0
_ABOUT = "about.json"
_HINT = f"name a folder on another disk in {FOLDER}, or set dataset.cache: false, which holds all rows in memory"

_WAITING = "another run reads the same rows: waiting for it"
_EVERY = 30.0  # seconds after which a long reading says how far it is

Tell = Callable[[str], None]
State = tuple[int, ...]  # bytes of a file, and what else changes with it
Lists = dict[str, list[list[Table]]]  # of each list of sources, the tables of each source


class Entry:
    """The rows of a run's sources, on the disk.

    Args:
        folder: of them.
        about: what stands in it beside the columns.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about.pop("check") != _check(about):
            raise ValueError(f"{folder / _ABOUT} is not what was written")
        self.remarks: list[str] = [str(note) for note in about["remarks"]]
        self._told = {name: [_told_of(one) for one in found] for name, found in about["told"].items()}
        self._ends = {name: [int(end) for end in ends] for name, ends in about["ends"].items()}
        self._files = {name: Files(folder / name) for name in self._ends}
        for name, files in self._files.items():
            if (self._ends[name] or [0])[-1] != len(files) or _checks(folder / name) != about["checks"][name]:
                raise ValueError(f"{folder / name} is not what was written")

    def source(self, number: int, *, held_out: bool) -> tuple[StoredRows, Told]:
        """The rows of one source, and what reading it told."""
        name = _name(held_out)
        ends = self._ends[name]
        places = np.arange(ends[number - 1] if number else 0, ends[number], dtype=np.int32)
        return StoredRows(self._files[name], places, ends, str(number)), self._told[name][number]

    @property
    def size(self) -> int:
        """Bytes of the columns."""
        return sum(files.bytes for files in self._files.values())


def opened(reader: Reader, tell: Tell) -> Entry | None:
    """The rows of a run as they are kept, read first where they are not; None where they are to be read into memory.

    Args:
        reader: of the run; told what there is to say.
        tell: takes what there is to say at once, where it takes long.

    Raises:
        DataError, UsageError: a row, or a file of rows, cannot be read.
        MachineError: the cache cannot be written.
    """
    dataset, said = reader.dataset, list[str]()
    if dataset.cache is False:
        return None
    lists: Lists = {
        _name(held_out): [tables(source, said, held_out=held_out) for source in sources]
        for held_out, sources in ((False, dataset.train), (True, dataset.val))
    }
    paths = [table.file for of in lists.values() for source in of for table in source]
    files = [path for path in paths if path is not None]
    total = sum(path.stat().st_size for path in files)
    if dataset.cache == "auto" and total < LARGE:
        return None
    if why := _unfit(reader) or ("not all rows are in files" if len(files) < len(paths) else ""):
        reader.notes.append(f"the rows are held in memory, and not kept (dataset.cache): {why}")
        return None
    cache, before = Cache(tell), {path: _state(path) for path in files}  # as they are when the key is made
    with _said(cache.folder):
        entry = cache.entry(reader, key_of(reader, lists, said, cache.dates), before)
    reader.notes.append(
        f"the rows are kept in {entry.folder} ({size(entry.size)}), so that the next run need not read them again"
    )
    return entry


def _unfit(reader: Reader) -> str:
    """Why rows cannot be kept; empty where they can."""
    if type(reader.encoder) is not TextEncoder:
        return "it is for rows that are one text each, such as those of causal-lm with train.objective sft"
    if reader.dataset.retrieve is not None:
        return "dataset.retrieve puts other passages into the rows of each run"
    if any(source.descriptions for source in (*reader.dataset.train, *reader.dataset.val)):
        return "the rows have descriptions"
    return "" if reader.tokenizer.is_fast else "the tokenizer is Python code, which has no hash"


class Cache:
    """The folder in which rows are kept.

    Args:
        tell: takes what there is to say at once.

    Raises:
        MachineError: it cannot be made.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        root = os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynlora"
        self.folder = Path(root).expanduser() / "rows"
        self.dates = self.folder / "files"
        with _said(self.folder):
            self.dates.mkdir(parents=True, exist_ok=True)

    def entry(self, reader: Reader, key: str, before: Mapping[Path, State]) -> Entry:
        """The rows with this key, which are read now if they are not there, or damaged.

        Args:
            reader: reads them.
            key: of all that they depend on.
            before: their files, as they were before their key was made.
        """
        folder = self.folder / key
        with _locked(self.folder / f"{key}.lock", lambda: self._tell(_WAITING)):
            entry = self._found(folder, reader.notes)
            if entry is None:
                self._clear()
                total = sum(sum(state[:1]) for state in before.values())
                refuse_full_disk(self.folder, int(1.3 * total), "the cache of the rows", FOLDER)
                if total >= LARGE:
                    self._tell(f"reading {size(total)} of files, once: their rows are then kept in {folder}")
                self._make(reader, folder, before)
                entry = Entry(folder)
            os.utime(folder / _ABOUT)
        self._keep_within(folder, reader.notes)
        return entry

    def _found(self, folder: Path, notes: list[str]) -> Entry | None:
        if not folder.exists():
            return None
        try:
            return Entry(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            notes.append(f"what was kept in {folder} is damaged ({error}), so the rows are read again")
            shutil.rmtree(folder)
            return None

    def _make(self, reader: Reader, folder: Path, before: Mapping[Path, State]) -> None:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: we hold the lock
        temporary.mkdir()
        try:
            with Team.of(reader) as team:
                about = {
                    _name(held_out): _written(reader, held_out, temporary, team, self._tell)
                    for held_out in (False, True)
                }
            for path, state in before.items():
                if _state(path) != state:
                    raise DataError(f"{path} has changed while it was read", "start again when nobody writes it")
            encoder = reader.encoder
            assert isinstance(encoder, TextEncoder)
            found = {
                "remarks": encoder.notes(template_name(reader.dataset.chat_template)),
                "told": {name: [_as_json(told) for told in of] for name, (of, _) in about.items()},
                "ends": {name: ends for name, (_, ends) in about.items()},
                "checks": {name: _checks(temporary / name) for name in about},
            }
            write_json(temporary / _ABOUT, found | {"check": _check(found)})
            sync_all(temporary)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _clear(self) -> None:
        """Remove what killed processes have left."""
        for left in self.folder.glob(".*.tmp"):
            with _if_free(self.folder / f"{left.name[1:-4]}.lock") as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)

    def _keep_within(self, used: Path, notes: list[str]) -> None:
        """Remove what was not used for longest until the rest is small enough, and what killed processes have left."""
        most = _most_bytes()
        self._clear()
        kept = dict[Path, float]()
        for path in self.folder.glob(f"*/{_ABOUT}"):
            with suppress(FileNotFoundError):  # another run has removed it just now
                kept[path.parent] = path.stat().st_mtime
        sizes = {path: _size(path) for path in kept}
        for path in sorted(kept, key=kept.__getitem__):
            if sum(sizes.values()) <= most:
                return
            if path == used:
                continue
            with _if_free(self.folder / f"{path.name}.lock") as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
                    notes.append(f"{path} was removed, so that the cache keeps within {size(most)} ({MOST})")
                    del sizes[path]


def _written(
    reader: Reader, held_out: bool, folder: Path, team: Team | None, tell: Tell
) -> tuple[list[Told], list[int]]:
    """Read a list of sources into its columns; what each told, and where its rows end."""
    writer, told, ends, first = Writer(folder / _name(held_out)), list[Told](), list[int](), 0
    due = time.monotonic() + _EVERY

    def take(rows: list[Kept] | Block) -> None:
        nonlocal due
        writer.add(rows if isinstance(rows, Block) else Block.of(rows))
        if time.monotonic() >= due:
            tell(f"{counted(writer.rows, 'row')} read so far")
            due = time.monotonic() + _EVERY

    try:
        for source in reader.dataset.val if held_out else reader.dataset.train:
            part = replace(reader, told=Told())
            first += read_source(part, source, held_out=held_out, first=first, take=take, team=team)
            told.append(part.told)
            ends.append(writer.rows)
    finally:
        writer.close()
    return told, ends


def _name(held_out: bool) -> str:
    return "val" if held_out else "train"


def _state(path: Path) -> State:
    try:
        stat = path.stat()
    except FileNotFoundError:  # which is a change as well
        return ()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _as_json(told: Told) -> dict[str, Any]:
    return {
        "notes": list(dict.fromkeys(told.notes)),
        "forms": sorted(told.forms),
        "turned": {name: sorted(turns) for name, turns in told.turned.items()},
        "variables": sorted(told.variables),
        "set_apart": told.set_apart,
        "lost": list(told.lost.items()),
    }


def _told_of(found: Mapping[str, Any]) -> Told:
    return Told(
        [str(note) for note in found["notes"]],
        set(found["forms"]),
        {name: set(turns) for name, turns in found["turned"].items()},
        set(found["variables"]),
        bool(found["set_apart"]),
        Counter({str(reason): int(count) for reason, count in found["lost"]}),
    )


def _checks(folder: Path) -> dict[str, int]:
    """Of each column but the tokens, which have their own, a checksum."""
    found = {}
    for name in COLUMNS.keys() - {TOKENS}:
        check = 0
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                check = zlib.crc32(piece, check)
        found[name] = check
    return found


def _check(about: Mapping[str, Any]) -> int:
    """A checksum of what is said of the columns."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _most_bytes() -> float:
    text = os.environ.get(MOST) or str(_DEFAULT_GB)
    try:
        most = float(text)
    except ValueError:
        most = -1.0
    if not most >= 0:
        raise UsageError(
            f"{MOST} is {text!r}, which is no number of gigabytes", f"write a number such as {_DEFAULT_GB:g}"
        )
    return most * 1e9


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Says what is wrong with the folder of the cache."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise MachineError(f"{folder}: the rows do not fit on the disk", _HINT) from None
        raise MachineError(f"{folder}: the rows cannot be kept there ({error.strerror or error})", _HINT) from None


@contextmanager
def _locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold a lock; called is `waits` before this waits for it. Where the disk knows no locks, nobody is waited for."""
    with path.open("a") as file:
        if not _lock(file.fileno(), wait=False):
            waits()
            _lock(file.fileno(), wait=True)
        yield


@contextmanager
def _if_free(path: Path) -> Iterator[bool]:
    """Hold a lock that nobody else holds."""
    with path.open("a") as file:
        yield _lock(file.fileno(), wait=False)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two writers work side by side, and the first one to rename is the one that is read
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
