"""Output folders that cannot be renamed over: links, the current folder, volumes, a parent that is another's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_helpers import Dynlora, contents
from tiny_run import make_recipe, train

from dynlora_cli.runs import folder as run_folder


def a_run(folder: Path, steps: int = 3) -> None:
    """What proves that dynlora made a folder."""
    folder.mkdir(exist_ok=True)
    record = {"schema_version": 1, "dynlora_version": "0.1", "summary": {"steps": steps}}
    (folder / "dynlora.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").touch()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of each kind, as a person would name it."""
    real = tmp_path / "real"
    real.mkdir()
    if request.param == "link":
        (tmp_path / "link").symlink_to(real)
        return tmp_path / "link"
    if request.param == "current":
        monkeypatch.chdir(real)
        return Path()
    if request.param == "volume":
        monkeypatch.setattr(Path, "is_mount", lambda self: self == real)
    else:
        access = os.access  # the test may run as root, to whom nothing is forbidden
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    return real


KINDS = ["link", "current", "volume", "parent of another"]


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_whole_folder_takes_the_place_of_what_was_there(place: Path, tmp_path: Path):
    a_run(tmp_path / "real")
    (tmp_path / "real" / "old" / "deep").mkdir(parents=True)
    with run_folder.replaced(place, overwrite=True) as folder:
        (folder / "new").mkdir()
        (folder / "new" / "file.txt").write_text("it")
        assert (tmp_path / "real" / "dynlora.json").exists(), "until the new one is whole"
    assert [str(path.relative_to(tmp_path / "real")) for path in sorted((tmp_path / "real").rglob("*"))] == [
        "new",
        "new/file.txt",
    ]
    assert place.is_dir()
    assert place.is_symlink() == (place.name == "link")


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_what_fails_leaves_what_was_there(place: Path, tmp_path: Path):
    a_run(tmp_path / "real")
    before = contents(tmp_path / "real")

    def fail() -> None:
        with run_folder.replaced(place, overwrite=True) as folder:
            (folder / "new.txt").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path / "real") == before
    assert not list(tmp_path.rglob("*.dynlora"))


@pytest.mark.slow
@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_run_and_what_is_made_of_it_go_there(place: Path, tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path / "work", "train.max_steps=3")
    for _ in range(2):
        train(recipe.model_copy(update={"output_dir": str(place)}), overwrite=True)
    assert (tmp_path / "real" / "report.html").is_file()
    train(recipe)
    answer = dynlora("prune", "--adapter", recipe.output_dir, "--budget", "0.5", "--out", place, "--overwrite")
    assert answer.code == 0, answer.err
    assert (tmp_path / "real" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "real" / "checkpoints").exists(), "the earlier run is gone"
