"""What is installed is what works: the wheel, in an environment of its own, away from the repository."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from dynlora_cli import __version__, plugins

REPOSITORY = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, REPOSITORY], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel in it; what dynlora depends on is lent to it."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    # A .pth file adds folders to the end of sys.path, and .pth files in those (an editable dynlora) are not followed.
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
    ]
    subprocess.run([*pip, wheel], check=True)
    return programs


def run(program: Path, *arguments: str, cwd: Path) -> str:
    """stdout of a program of the new environment, in a folder outside the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_alone(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dynlora_cli", f"dynlora-{__version__}.dist-info"}
    committed = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "dynlora_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("dynlora_cli/")} == committed
    for needed in ("py.typed", "assets/report.css", "assets/report.js", "assets/builtin_tiny/model.safetensors"):
        assert f"dynlora_cli/{needed}" in names
    assert f"dynlora-{__version__}.dist-info/licenses/LICENSE" in names
    assert wheel.stat().st_size < 10_000_000


def test_it_is_the_wheel_that_runs(scripts: Path, tmp_path: Path):
    place = run(scripts / "python", "-c", "import dynlora_cli; print(dynlora_cli.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(scripts.parent)
    assert run(scripts / "dynlora", "--version", cwd=tmp_path) == f"dynlora {__version__}\n"


def test_schema_knows_the_plug_ins(scripts: Path, tmp_path: Path):
    schema = json.loads(run(scripts / "dynlora", "schema", cwd=tmp_path))
    assert schema["title"] == "Recipe"
    found = run(
        scripts / "python", "-c", "from dynlora_cli import plugins; print(*plugins.names('policies'))", cwd=tmp_path
    )
    assert found.split() == plugins.names("policies")


def test_train_on_what_is_built_in(scripts: Path, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(
        "model: builtin:tiny\ndataset: builtin:stdlib-docs\nrank: {init: 4, budget: 1}\n"
        "train: {max_steps: 3, micro_batch_size: 2}\neval: {max_samples: 8}\n",
        encoding="utf-8",
    )
    summary = json.loads(run(scripts / "dynlora", "train", "recipe.yaml", "--json", cwd=tmp_path))
    assert summary["steps"] == 3
    assert summary["parameters"] <= summary["budget_parameters"]
    produced = {path.name for path in (tmp_path / "out" / "recipe").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html", "README.md"} <= produced
