"""Writing an output folder: one process at a time, and the old folder stays until the new one is complete.

While somebody writes, a folder of ours stands beside it (inside it, where its parent takes nothing):

    .NAME.dynlora/
      owner.json   who writes: host, process, and when that began; locked as long as the process lives
      new/         what is being made
      kept/        the old folder, whole, while the new one takes its place
      moving/      likewise, where entries must move one by one: the rest of the old is still in its place
      gone/        what is being removed

A process may be killed at any moment: either the old or the new folder is whole then, and the next `claimed` puts that
one in place.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.files.whole import remove, sync
from dynlora_cli.text import size

ENDING = ".dynlora"
OWNER = "owner.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that know none
FULL = (errno.ENOSPC, errno.EDQUOT)
_MARK = b'{"dynlora": "writes here"'  # how the owner's text begins

_held: dict[Path, OutputPlace] = {}  # of this process, so that a command may ask for a place that it has already


def is_workplace(folder: Path) -> bool:
    """Whether this is such a folder of ours beside an output folder; nothing in it is for use."""
    return folder.name.startswith(".") and folder.name.endswith(ENDING)


def refuse_full_disk(folder: Path, needed: int, what: str, option: str = "--out") -> None:
    """Check that there is room for what will be written.

    Args:
        folder: where it goes; need not be there yet.
        needed: bytes.
        what: it is, for the message.
        option: that names the folder.

    Raises:
        MachineError: there is not.
    """
    parent = next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MachineError(
            f"{what} takes {size(needed)}, and {parent} has {size(free)} left",
            f"free some, or choose another {option}",
        )


@contextmanager
def claimed(folder: Path, option: str, is_lost: Callable[[Path], bool]) -> Iterator[OutputPlace]:
    """Hold the place of an output folder. If a killed process has left it half done, it is put in order first.

    Args:
        folder: absent or not. Parents that are missing are made, and go again if they stay empty.
        option: that names it.
        is_lost: whether a folder that has replaced an older one never came to anything, so that the old comes back.

    Raises:
        UsageError: another process writes there, or nobody can.
        MachineError: the disk is full.
    """
    path = resolved(folder, option)
    if path in _held:
        yield _held[path]
        return
    place = OutputPlace(path, f"{option} {folder}", is_lost)
    with place.locked():
        _held[path] = place
        try:
            place.settle()
            yield place
        finally:
            del _held[path]
            place.settle()


def resolved(folder: Path, option: str) -> Path:
    """The folder without links in its path.

    Raises:
        UsageError: its links lead in a circle, or it is no path at all.
    """
    try:
        return folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{option} {str(folder)!r} is no usable path: {error}", f"choose another {option}") from None


class OutputPlace:
    """A place that this process holds; made by `claimed`."""

    def __init__(self, path: Path, named: str, is_lost: Callable[[Path], bool]) -> None:
        self.path, self.named, self._is_lost = path, named, is_lost
        self.brought_back = False
        # Renaming a volume or what is in a closed parent fails; the current folder would be another one for its shell.
        inside = path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK))
        self.fixed = inside or (path.is_dir() and path == Path.cwd())
        self.work = path / ENDING if inside else path.with_name(f".{path.name}{ENDING}")
        self.new, self.kept, self.moving, self.gone = (self.work / name for name in ("new", "kept", "moving", "gone"))

    # -- the old gives way to the new -----------------------------------------------------------------------------

    def make_new(self) -> Path:
        """An empty folder on the same disk."""
        remove(self.new)
        self.new.mkdir()
        return self.new

    def keep_old(self) -> None:
        """Move what is in the place aside, if there is anything."""
        if not self.fixed:
            if self.path.exists():
                os.rename(self.path, self.kept)
        elif entries := self._entries():
            self.moving.mkdir()
            for entry in entries:
                os.rename(entry, self.moving / entry.name)
            os.rename(self.moving, self.kept)
        sync(self.work)

    def put_new(self) -> None:
        """Move what was made into the place, which is free."""
        if self.fixed:
            for entry in list(self.new.iterdir()):
                os.rename(entry, self.path / entry.name)
            self.new.rmdir()
        else:
            os.rename(self.new, self.path)
        sync(self.path.parent)

    def give_up_old(self) -> None:
        """Remove what was kept."""
        if self.kept.exists():
            os.rename(self.kept, self.gone)
            remove(self.gone)

    def settle(self) -> None:
        """End what was begun: the new stays if it is whole, else the old comes back."""
        if self.moving.exists():
            self._move_back()
        if self.kept.exists():
            half = self.fixed and self.new.exists()
            if half or not self.path.exists() or self._is_lost(self.path):
                self._bring_back()
            else:
                self.give_up_old()
        for leftover in (self.gone, self.new):
            remove(leftover)

    def _bring_back(self) -> None:
        self.brought_back = True
        if self.fixed:
            for entry in self._entries():
                remove(entry)
            os.rename(self.kept, self.moving)
            self._move_back()
        else:
            remove(self.gone)
            if self.path.exists():
                os.rename(self.path, self.gone)
            os.rename(self.kept, self.path)

    def _move_back(self) -> None:
        for entry in list(self.moving.iterdir()):
            os.rename(entry, self.path / entry.name)
        self.moving.rmdir()

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if entry != self.work]

    # -- one writer ------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the owner of the place. Afterwards our folder beside it is gone, unless it holds what is still needed."""
        made = [parent for parent in (self.work.parent, *self.work.parent.parents) if not parent.exists()]
        descriptor = self._open()
        try:
            yield
        finally:
            with suppress(OSError):  # the folder was removed meanwhile, or still holds something
                if os.listdir(self.work) == [OWNER]:
                    (self.work / OWNER).unlink()
                    self.work.rmdir()
                    for parent in made:
                        parent.rmdir()
            os.close(descriptor)

    def _open(self) -> int:
        """The locked owner file, with this process in it."""
        while True:
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                if not (self.work / OWNER).exists() and any(self.work.iterdir()):
                    raise UsageError(f"{self.work} is in the way, and holds no {OWNER} of dynlora", "move it elsewhere")
                descriptor = os.open(self.work / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and self.work.parent.is_dir() and self.work.is_dir():
                    continue  # its last owner has just removed it
                raise self._unusable(error) from None
            try:
                self._take(descriptor)
                if os.path.samestat(os.fstat(descriptor), os.stat(self.work / OWNER)):
                    return descriptor
            except FileNotFoundError:
                pass  # removed between opening and locking: once more
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        """Lock the file and write this process into it.

        Raises:
            UsageError: another process has it.
        """
        free = _lock(descriptor)
        text = os.pread(descriptor, 4096, 0) if hasattr(os, "pread") else os.read(descriptor, 4096)
        owner = self._owner(text)
        # Where the lock is free, its owner is dead; but locks are not kept everywhere, and not always between hosts.
        if owner and free is not True and (free is False or _lives(owner)):
            raise UsageError(f"{self.named} is in use by process {owner.get('pid')}", self._way_on())
        if free is False:
            raise UsageError(f"{self.named} is in use by another process", self._way_on())
        here = free is True and owner and owner.get("boot") is not None and owner["boot"] == _boot()
        if owner and owner.get("host") != socket.gethostname() and not here:
            empty = shlex.join(["truncate", "-s", "0", str(self.work / OWNER)])
            raise UsageError(
                f"{self.named} is in use by process {owner.get('pid')} on the host {owner.get('host')}",
                f"wait for it, or choose another folder; if that host or process is no more: {empty}",
            )
        me: dict[str, Any] = {"dynlora": "writes here", "host": socket.gethostname(), "boot": _boot()}
        me |= {"pid": os.getpid(), "began": _began(os.getpid())}
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            os.write(descriptor, json.dumps(me).encode())
        except OSError as error:
            raise self._unusable(error) from None

    def _owner(self, text: bytes) -> dict[str, Any] | None:
        """Who is written in the file; None where it was made just now, or its owner died while writing."""
        if not text.strip(b"\0"):  # or torn by a loss of power
            return None
        if (text.startswith(_MARK) or _MARK.startswith(text)) and not text.rstrip(b"\0").endswith(b"}"):
            return None  # torn in the middle
        try:
            owner = json.loads(text)
            if isinstance(owner, dict) and "dynlora" in owner and type(owner.get("pid")) is int:
                return owner
        except ValueError:
            pass
        raise UsageError(f"{self.work / OWNER} was not written by dynlora", "move it elsewhere")

    def _way_on(self) -> str:
        return "wait until it is done, or stop it; or choose another folder"

    def _unusable(self, error: OSError) -> DynloraError:
        message = f"{self.named}: {self.work.parent} takes no new folder ({error.strerror})"
        if error.errno in FULL:
            return MachineError(message, "free some space, or choose another folder")
        return UsageError(message, "choose another folder")


def _lock(descriptor: int) -> bool | None:
    """Whether the file could be locked; None where the file system knows no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # behind the text, which others may read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_LOCKS else False
    return True


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that is written down still runs on this host; numbers are used again by later processes."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return owner.get("began") in (None, _began(owner["pid"]))


def _boot() -> str | None:
    """An id of this start of the machine; it is the same in all its containers, which host names are not."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return None


def _began(process: int) -> str | None:
    """When a process began, in clock ticks since the machine started; None where the system does not say."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    return None
