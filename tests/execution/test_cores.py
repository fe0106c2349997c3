"""The cores that a process may use, by its control groups."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dynlora_cli.execution import cores


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes control groups: what `/proc/self/cgroup` says, and files by name."""
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def write(own, **files):
        (tmp_path / "cgroup").write_text(own)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/of/the/machine\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "what?"}, 64),
        ("3:memory:/x\n2:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_what_control_groups_allow(groups, own, files, expected):
    groups(own, **files)
    assert cores.usable_cores() == expected


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 6}, raising=False)
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(("affinity", "given", "expected"), [(64, None, "3"), (64, "7", "7"), (3, None, "None")])
def test_openmp_is_told(affinity, given, expected):
    """Before torch is imported, where it would start too many, and unless somebody has said a number."""
    script = (
        f"AFFINITY = {affinity}\n"
        "import os, sys; from dynlora_cli.execution import cores; cores.usable_cores = lambda: 3; cores._affinity = lambda: AFFINITY\n"
        "sys.argv = ['dynlora', '--version']\nfrom dynlora_cli.cli import app\n"
        "try:\n    app.main()\nexcept SystemExit:\n    print(os.environ.get('OMP_NUM_THREADS'), 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


@pytest.mark.parametrize(("given", "expected"), [(None, "4"), ("7", "7")])
def test_processes_share_the_cores(given, expected, monkeypatch):
    monkeypatch.delenv(cores.THREADS, raising=False)
    monkeypatch.setattr(cores, "_set_here", [])
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.setattr(cores, "_affinity", lambda: 64)
    if given:
        monkeypatch.setenv(cores.THREADS, given)
    else:
        cores.limit_threads()
        assert os.environ[cores.THREADS] == "8"
    assert cores.threads_of_each(2) == expected
    monkeypatch.delenv(cores.THREADS)
