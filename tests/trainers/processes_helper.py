"""Starts scripts in one or more processes that find each other through gloo, as torchrun would start them.

They are forks of one process that has imported what is slow to import, which takes some seconds for each otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
IMPORTED = ["torch.distributed", "transformers", "accelerate", "peft", "datasets", "dynlora_cli.commands.train"]
SECONDS = 240


def two(script: str, *arguments: str, folder: Path, processes: int = 2) -> str:
    """Run a Python script's text in several processes; what the first of them printed.

    Args:
        script: the text.
        arguments: of the script.
        folder: where it is written, and where it runs.
        processes: how many.
    """
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(IMPORTED)
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        started.Process(target=_run, args=(path, arguments, shared | {"RANK": rank, "LOCAL_RANK": rank}))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + SECONDS
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.02)
        if time.monotonic() > until:
            break
    for rank in ranks:  # one has failed, and the others wait for it
        rank.terminate()
        rank.join()
    said = [_said(path, number, "err") for number in range(processes)]
    assert [rank.exitcode for rank in ranks] == [0] * processes, "\n".join(text[-4000:] for text in said)
    return _said(path, 0, "out")


def _said(path: Path, rank: int, stream: str) -> str:
    return path.with_suffix(f".{rank}.{stream}").read_text(encoding="utf-8")


def _run(path: Path, arguments: tuple[str, ...], environment: dict[str, object]) -> None:
    """The script, in a process of its own."""
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = path.with_suffix(f".{environment['RANK']}.{name}").open("w", encoding="utf-8")
        os.dup2(file.fileno(), stream.fileno())
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    os.chdir(path.parent)
    sys.path[:0] = [str(each) for each in (TESTS.parent, TESTS, TESTS / "trainers", TESTS / "hypernets")]
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
    sys.stdout.flush()
