"""Libraries made once; tests work on copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_helpers import Run, foreign
from library_helpers import Made, silent

from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.models.quiet import quiet


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, runs: Callable[[str], Run]) -> Made:
    folder, run = tmp_path_factory.mktemp("library"), runs("llama").folder
    base = run.parent / "llama"
    other = foreign(base, folder / "other", target_modules=["q_proj", "up_proj"])
    with quiet:
        add(folder / "lib", Addition(run, name="first", tags=["sorting"]), silent)
    return Made(folder / "lib", run, base, other, run.parent / "llama.jsonl")


@pytest.fixture
def made(made_once: Made, tmp_path: Path) -> Made:
    """A copy that a test may change."""
    return made_once._replace(root=Path(shutil.copytree(made_once.root, tmp_path / "lib")))
