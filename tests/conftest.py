"""Shared fixtures. No test touches the network."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli_helpers import Dynlora
    from eval_helpers import Run
    from library_helpers import Made

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests but its own: they compare numbers more closely than bf16 on a GPU allows."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DYNLORA_SHARED", REPOSITORY.parent / "shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no data sets and models at {SHARED} (set DYNLORA_SHARED)")
    return SHARED


@pytest.fixture
def dynlora(capfd: pytest.CaptureFixture[str]) -> Dynlora:
    """Runs `dynlora ARGUMENTS`."""
    from cli_helpers import runner

    return runner(capfd)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program to run as `dynlora` in a process of its own, without loading torch anew."""
    from cli_helpers import warm_process

    with warm_process(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture
def dynlora_eval(dynlora: Dynlora) -> Dynlora:
    """Runs `dynlora eval ARGUMENTS`."""
    return lambda *arguments: dynlora("eval", *arguments)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Finished runs by the kind of their model, each trained once; not to be changed."""
    from eval_helpers import finished_run

    made: dict[str, Run] = {}
    root = tmp_path_factory.mktemp("runs")

    def of(kind: str) -> Run:
        if kind not in made:
            made[kind] = finished_run(root / kind, kind)
        return made[kind]

    return of


@pytest.fixture
def llama(runs: Callable[[str], Run]) -> Run:
    return runs("llama")


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on conversations; not to be changed."""
    from eval_helpers import finished_chat_run

    return finished_chat_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, runs: Callable[[str], Run]) -> Made:
    """A library with one update, for the tests of tests/library; not to be changed."""
    from library_helpers import make_library

    return make_library(tmp_path_factory.mktemp("library"), runs("llama").folder)


@pytest.fixture
def made(made_once: Made, tmp_path: Path) -> Made:
    """A copy that a test may change."""
    return made_once._replace(root=Path(shutil.copytree(made_once.root, tmp_path / "lib")))


@pytest.fixture
def plug_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes a plug-in for one test: `plug_in("variants", "toy", text)` is a file toy.py that dynlora finds as its own."""
    from dynlora_cli import plugins

    root, made = tmp_path_factory.mktemp("plug-ins"), []

    def make(kind: str, name: str, text: str) -> Path:
        package = importlib.import_module(f"dynlora_cli.{plugins.FOLDERS[kind]}")
        folder, module = root / kind, name.replace("-", "_")
        if str(folder) not in package.__path__:
            folder.mkdir()
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        path = folder / f"{module}.py"
        path.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        made.append((package, module))
        return path

    yield make
    for package, module in made:
        sys.modules.pop(f"{package.__name__}.{module}", None)
        vars(package).pop(module, None)
