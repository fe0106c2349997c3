"""Runs `dynlora ARGUMENTS` in this process; conftest.py has the fixture `dynlora`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynlora_cli.cli.app import main


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


Dynlora = Callable[..., Answer]


def runner(capfd: pytest.CaptureFixture[str]) -> Dynlora:
    """Captures the file descriptors, so that nothing a library prints escapes."""

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Answer(end.value.code or 0, *capfd.readouterr())  # type: ignore[arg-type]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- processes -------------------------------------------------------------------------------------------------------

# Loads what every command that computes loads, then becomes each command by a fork: a process of its own, with its own
# streams, folder and exit code, seconds sooner than a new one.
_WARM = """
import json, os, signal, socket, sys
import torch, transformers, accelerate, datasets, peft
from dynlora_cli.cli.app import main
import dynlora_cli.commands.train, dynlora_cli.commands.evaluate, dynlora_cli.commands.merge, dynlora_cli.commands.export
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("warm", flush=True)
while True:
    client, _ = server.accept()
    asked, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
    if os.fork():
        client.close()
        for stream in streams:
            os.close(stream)
        continue
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, code = json.loads(asked), 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(asked["cwd"])
        os.environ.update(asked["env"])
        sys.argv = ["dynlora", *asked["arguments"]]
        main(asked["arguments"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(str(code).encode())
        os._exit(0)
"""
_ASK = """#!{python}
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
code = server.recv(8)
sys.exit(int(code) if code else 70)
"""


@contextmanager
def warm_process(folder: Path) -> Iterator[Path]:
    """A program to run as `dynlora`, from a shell or as a process, which does not load torch anew each time.

    Not for what is about loading, or about signals: these reach the program, and not the command.
    """
    address, program = folder / "socket", folder / "dynlora"
    with subprocess.Popen([sys.executable, "-c", _WARM, str(address)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "warm\n"
            program.write_text(_ASK.format(python=sys.executable, address=str(address)), encoding="utf-8")
            program.chmod(0o755)
            yield program
        finally:
            server.terminate()
