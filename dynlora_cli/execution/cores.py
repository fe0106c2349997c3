"""How many processor cores this process may use, which can be fewer than the machine has.

A container with `--cpus 4` on a machine of 64 cores sees all 64. OpenMP would start 64 threads, which then stand still
for most of the time, since the system gives the container 4 cores' worth of each second.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that the process may run on, and no more than its control groups allow it the time of; at least 1."""
    return max(1, min([_affinity(), *(math.ceil(share) for share in _shares())]))


def limit_threads() -> None:
    """Have OpenMP start no more threads than there are usable cores, unless the environment says a number.

    To be called before torch is imported. Where nothing limits the process, OpenMP and torch choose: they know which
    cores are halves of one.
    """
    cores = usable_cores()
    if THREADS not in os.environ and cores < _affinity():
        os.environ[THREADS] = str(cores)
        _set_here.append(os.environ[THREADS])


def threads_of_each(processes: int) -> str:
    """`OMP_NUM_THREADS` for each of several processes on this machine: its share of the cores, or what was said."""
    said = os.environ.get(THREADS)
    return said if said and said not in _set_here else str(max(1, usable_cores() // processes))


_set_here: list[str] = []  # by `limit_threads`, and not by a person


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares() -> list[float]:
    """What each control group above this process allows, in cores; those without a limit are left out.

    Source: cgroups(7) of Linux: `cpu.max` of version 2, `cpu.cfs_quota_us` of version 1.
    """
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = GROUPS / "cpu" if controllers else GROUPS
        own = top / path.lstrip("/")
        # In a container the path may be that of the machine outside, and what is mounted is the container's own group.
        folders = [own, *own.parents] if own.is_dir() else [top]
        found += [share for folder in folders if folder.is_relative_to(top) and (share := _share(folder))]
    return found


def _share(folder: Path) -> float | None:
    """Cores that one group allows; None: it has no limit, or does not say."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="utf-8") for n in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None
