"""A disk that becomes full while dynlora writes: a small file system in memory, seen by this process alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

from . import kills
from . import made as runs
from .child import command
from .trial import Impossible, Kind, Lost, ProvesNothing, Trial

NEW_MOUNTS, NEW_USER = 0x0002_0000, 0x1000_0000  # CLONE_NEWNS and CLONE_NEWUSER of linux/sched.h
PAGE = 4096
FREED = 64 * 1024 * 1024  # bytes, once space has been freed
WORDS = ("no space left", "No space left", " left\n hint: free some")


@cache
def own_mounts() -> None:
    """Let this process mount what no other process sees.

    Raises:
        Impossible: the system does not let it.
    """
    user, group = os.getuid(), os.getgid()
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except AttributeError:
        raise Impossible("a file system of one's own needs Linux") from None
    if unshare(NEW_USER | NEW_MOUNTS):
        raise Impossible(f"no file system of one's own: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise Impossible(f"no file system of one's own: {error}") from None
    _mount("--make-rprivate", "/")


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Impossible(f"mount {' '.join(arguments[:2])}: {done.stderr.strip()}")


def _pages(folder: Path) -> int:
    """Bytes that a folder takes there."""
    return sum(PAGE * -(-path.stat().st_size // PAGE) if path.is_file() else 0 for path in folder.rglob("*"))


def run(trial: Trial) -> str:
    """A command on a disk with too little room, and again when there is more."""
    own_mounts()
    name = list(kills.CASES)[trial.number % len(kills.CASES)]
    case, disk = kills.CASES[name], trial.work / "disk"
    kills.ready(trial.made, name)
    out = disk / "out"
    disk.mkdir()
    room = int(_pages(trial.made / case.new) * trial.chance.uniform(0, 1.1)) // PAGE * PAGE
    size = PAGE + room + (_pages(trial.made / case.old) if case.old else 0)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
    try:
        if case.old:
            runs.copy(trial.made / case.old, out)
        return _survive(trial, name, case, out, f"{name} with room for {room:,} bytes")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _survive(trial: Trial, name: str, case: kills.Case, out: Path, what: str) -> str:
    answer = command(case.arguments(trial.made, out), trial.work)
    try:
        answer.must(0, 3)
        if answer.code == 0:
            raise ProvesNothing("there was room enough")
        if not any(words in answer.said for words in WORDS):
            raise Lost(f"it does not say that the disk is full: {answer.said[-800:]}")
        if case.old and not name.startswith("train"):
            runs.same_files(out, trial.made / case.old)
        _mount("-o", f"remount,size={FREED}", str(out.parent))
        gone_on = (kills.after_train if name.startswith("train") else kills.after_writing)(trial, case, out)
        runs.alone(out.parent, "out")
    except Lost as lost:
        raise Lost(f"{what}: {lost}") from None
    return f"said so; {gone_on}"


KIND = Kind(
    name="disk",
    what="the disk becomes full while `train`, `prune`, `merge` and `export` write: exit code 3, what was whole stays"
    " whole, and with more room it goes on",
    tried=60,
    bounded=1,
    batch=5,
    seconds=400,
    prepare=runs.prepare,
    run=run,
)
