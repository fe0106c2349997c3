"""Runs `dynlora ARGUMENTS` in this process; conftest.py has the fixture `dynlora`."""

from __future__ import annotations

import json
from collections.abc import Callable
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
