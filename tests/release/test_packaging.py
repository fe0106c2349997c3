"""What is handed over: the sdist and the wheel as a package index gets them, the container, and the workflows."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynlora_cli import __version__

REPOSITORY = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


# -- sdist and wheel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, the wheel made from the sdist as pip would."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_an_index_takes_them(dist: Path):
    files = sorted(dist.iterdir())
    assert [file.name for file in files] == [f"dynlora-{__version__}-py3-none-any.whl", f"dynlora-{__version__}.tar.gz"]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2
    with zipfile.ZipFile(files[0]) as wheel:
        metadata = Parser().parsestr(wheel.read(f"dynlora-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert all(metadata[key] for key in ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python"))
    assert len(metadata.get_all("Classifier")) > 10
    assert not re.search(r"\]\((?!https?:|#)", metadata.get_payload()), "a relative link leads nowhere on an index"


@pytest.mark.slow
def test_the_sdist_can_be_tested(dist: Path, tmp_path: Path):
    """It holds every file of the repository that tests read, and tests run in it."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    committed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if committed.returncode == 0:  # no sdist itself
        missing = [name for name in committed.stdout.splitlines() if not (root / name).exists()]
        assert not [name for name in missing if not name.startswith((".ci/", ".gitignore"))]
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/config/test_recipe_problems.py"]
    done = subprocess.run(test, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("package_readme", REPOSITORY / "scripts" / "package_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.for_index


def test_links_of_the_readme_become_absolute_or_text(readme: Callable[..., str]):
    text = "![A [map]](docs/a.svg) [here](docs/a.md#part), [there](https://x.org), [below](#below)"
    assert readme(text, "https://h.org/o/r", "v1") == (
        "![A [map]](https://h.org/o/r/raw/v1/docs/a.svg) [here](https://h.org/o/r/blob/v1/docs/a.md#part), "
        "[there](https://x.org), [below](#below)"
    )
    assert readme(text, None, "v1") == "A [map] here, [there](https://x.org), [below](#below)"


# -- the container ---------------------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """Of a Dockerfile: each instruction with its arguments, lines that go on put together."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, `FROM` first."""
    found: list[list[tuple[str, str]]] = [[]]
    for one in instructions((REPOSITORY / "Dockerfile").read_text(encoding="utf-8")):
        if one[0] == "FROM":
            found.append([])
        found[-1].append(one)
    return found[1:]


def copied(stage: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """What a stage copies from the repository: sources and target."""
    found = [words.split() for name, words in stage if name == "COPY" and not words.startswith("--from")]
    return [(words[:-1], words[-1]) for words in found]


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file or folder of the top out of the build."""
    kept = True
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.lstrip("!")):
            kept = line.startswith("!")
    return not kept


def test_all_that_is_copied_is_there(stages: list[list[tuple[str, str]]]):
    sources = [source for stage in stages for names, _ in copied(stage) for source in names]
    assert {"pyproject.toml", "dynlora_cli", "constraints.txt"} <= set(sources)
    assert not [source for source in sources if not (REPOSITORY / source).exists() or ignored(source)]
    assert ignored("tests")


def test_it_runs_the_command_as_nobody_special(stages: list[list[tuple[str, str]]]):
    last = stages[-1]
    told = dict(last)
    assert json.loads(told["ENTRYPOINT"]) == ["dynlora"]
    assert "dynlora" in PROJECT["scripts"]
    assert json.loads(told["CMD"]) == ["--help"]
    names = [name for name, _ in last]
    assert told["USER"] == "dynlora"
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    (cache,) = json.loads(told["VOLUME"])
    assert f"HF_HOME={cache}/" in " ".join(words for name, words in last if name == "ENV")
    assert ("ARG", "TORCH=cpu") in last


@pytest.mark.slow
def test_the_wheel_of_the_container_is_made_of_what_it_copies(stages: list[list[tuple[str, str]]], tmp_path: Path):
    """The first stage, instruction by instruction, without a container and with the packages that lie at hand."""
    work, wheels, listed = (tmp_path / name for name in ("source", "wheels", "requirements.txt"))
    for folder in (work, wheels):
        folder.mkdir()
    extras = dict(words.split("=", 1) for name, words in stages[0] if name == "ARG")["EXTRAS"]
    here = {
        "pip wheel": f"{sys.executable} -m pip wheel --no-build-isolation",
        "python -c": f"{sys.executable} -c",
        "/requirements.txt": str(listed),
        "/wheels": str(wheels),
    }
    for name, words in stages[0]:
        if name == "COPY":
            *sources, target = words.split()
            for one in sources:
                place = work / target / Path(one).name if target.endswith("/") else work / target
                place.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", REPOSITORY / one, place], check=True)
        if name == "RUN":
            line = re.sub("|".join(map(re.escape, here)), lambda match: here[match[0]], words)
            subprocess.run(["bash", "-c", line], cwd=work, check=True, env={"EXTRAS": extras, "PATH": "/usr/bin:/bin"})
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as made:
        assert "dynlora_cli/assets/builtin_tiny/model.safetensors" in made.namelist()
    wanted = listed.read_text(encoding="utf-8").splitlines()
    of_extras = [one for extra in extras.split(",") for one in PROJECT["optional-dependencies"][extra]]
    assert wanted == [*PROJECT["dependencies"], *of_extras]


def test_the_devcontainer_makes_what_tests_need():
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    script = container["postCreateCommand"]
    assert (REPOSITORY / re.findall(r"source (\S+)", script)[0]).is_file()
    assert "environment dev" in script


# -- the workflows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_sound(path: Path):
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow[True], "when it runs; YAML reads `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for needed in [job["needs"]] if "needs" in job else []:
            assert needed in workflow["jobs"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w./-]+@[\w./]+", step["uses"])
            for script in re.findall(r"\bscripts/\w+\b", step.get("run", "")):
                assert (REPOSITORY / script).is_file()


def test_ci_runs_what_a_contributor_runs():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}
    assert set(texts) == {"ci", "docs", "release"}
    assert "run: scripts/test\n" in texts["ci"]
    assert "mkdocs build --strict" in texts["docs"]


def test_a_tag_that_is_not_the_version_makes_no_release(tmp_path: Path):
    """The release workflow's own check, run with the right tag and a wrong one."""
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    (check,) = [step["run"] for step in jobs["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    check = check.replace("python -c", f"{sys.executable} -c")
    for tag, code in ((f"v{__version__}", 0), ("v99", 1)):
        done = subprocess.run(["bash", "-ec", check], cwd=REPOSITORY, env={"GITHUB_REF_NAME": tag}, check=False)
        assert done.returncode == code
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in str(jobs["publish"]), "PyPI trusts the workflow; there is no token"
