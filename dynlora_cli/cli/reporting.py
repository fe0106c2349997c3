"""What every command shares: one place where errors become messages and exit codes.

0 done                                        1 the run failed
2 change the command, recipe or named input   3 change the machine, or fetch what is missing
4 a measured number failed                    130 interrupted after a clean checkpoint
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynlora_cli.cli.faults import as_ours
from dynlora_cli.errors import DynloraError
from dynlora_cli.execution.launch import LOST_OTHERS, is_launched, is_main_process
from dynlora_cli.execution.lost import leave_mark, lost_others, waited_too_long

if TYPE_CHECKING:
    from dynlora_cli.cli.views.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")]
M_MMAP_THRESHOLD = -3  # a constant of glibc's malloc.h, see mallopt(3)


def return_memory_at_once() -> None:
    """Let every freed block of a MiB or more go back to the system: glibc keeps some of up to 32 MiB for later.

    For commands that read a model tensor by tensor and promise to need little more than the largest one: a sixth of
    their peak was such blocks. A command that trains is faster without.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no mallopt, and keeps no such blocks
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def reporting(as_json: bool, *, lines: bool = False) -> Iterator[dict[str, Any]]:
    """Run a command: the result goes to stdout as JSON if asked for, an error to stderr, with its exit code.

    Args:
        as_json: stdout holds one JSON object.
        lines: it holds a JSON object a line, which the command prints itself; one that says what failed comes last.
    """
    result: dict[str, Any] = {}
    stdout = sys.stdout
    code = 0
    try:
        # Whatever a library prints is for people; stdout holds the result alone.
        with redirect_stdout(sys.stderr):
            yield result
    except DynloraError as error:
        result, code = _failure(error), error.exit_code
        console().error(error)  # printed by every process: an error that only one of them has met must not get lost
    except typer.Exit:  # the launched processes have printed their own error
        raise
    except KeyboardInterrupt:
        result, code = {"ok": False, "error": "interrupted"}, 130
        typer.echo("interrupted", err=True)
    except (Exception, SystemExit) as error:  # a package may end the program when it is imported
        if is_launched() and lost_others(error) and not waited_too_long(error):
            leave_mark()
            raise typer.Exit(LOST_OTHERS) from None
        known = as_ours(error)
        if known is None:
            if as_json and is_main_process() and isinstance(error, Exception):
                print(json.dumps({"ok": False, "error": f"{type(error).__name__}: {error}"}), file=stdout)
            raise
        result, code = _failure(known), known.exit_code
        console().error(known)
    if as_json and (code or (is_main_process() and not lines)):
        print(json.dumps(result, allow_nan=False, default=str), file=stdout)
    if code:
        raise typer.Exit(code)


def _failure(error: DynloraError) -> dict[str, Any]:
    return {"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}


def console() -> Console:
    """Writes for people, to stderr."""
    from dynlora_cli.cli.views.console import Console

    return Console()


def typed(*words: str) -> str:
    """A command of this program as it can be typed here: with its path where the shell would not find it by name."""
    called = sys.argv[0]
    found = shutil.which("dynlora")
    here = Path(called).name == "dynlora" and os.path.exists(called)
    if here and (found is None or not os.path.samefile(found, called)):
        return shlex.join([_below_here(called), *words])
    return shlex.join(["dynlora", *words])


def opened(page: Path) -> str:
    """A command that shows a page in the browser."""
    python = "python" if shutil.which("python") else "python3"
    return shlex.join([python, "-m", "webbrowser", str(page.resolve())])


def _below_here(path: str) -> str:
    """Relative to the present folder, where that is shorter than the whole path."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else os.path.join(os.path.dirname(relative) or ".", Path(path).name)
