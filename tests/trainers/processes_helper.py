"""Starts scripts in two processes that find each other through gloo, as torchrun would on a machine of two devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def two(script: str, *arguments: str, folder: Path, processes: int = 2) -> str:
    """Run a Python script's text under torchrun; what its first process printed.

    Args:
        script: the text.
        arguments: of the script.
        folder: where it is written, and where it runs.
        processes: how many.
    """
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    where = [str(path) for path in (TESTS.parent, TESTS, TESTS / "trainers", TESTS / "hypernets")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(where),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, str(path), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
