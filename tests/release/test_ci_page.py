"""docs/howto/ci.md: its workflow is one, and its steps do what it says, on its recipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "howto" / "ci.md").read_text(encoding="utf-8")


def titled(title: str) -> str:
    return re.findall(rf'```yaml title="{re.escape(title)}"\n(.*?)^```', PAGE, re.M | re.S)[0]


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    return yaml.safe_load(titled("model.yml"))["jobs"]["model"]["steps"]


def script(steps: list[dict[str, Any]], name: str) -> str:
    return next(step["run"] for step in steps if step.get("name") == name)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory):
    """Runs a step as a runner does, in a folder with the page's recipe; the exit code, and what was said."""
    folder = tmp_path_factory.mktemp("ci")
    (folder / "bin").mkdir()
    program = folder / "bin" / "dynlora"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dynlora_cli "$@"\n')
    program.chmod(0o755)
    (folder / "recipe.yaml").write_text(titled("recipe.yaml"), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": "summary.md"}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"

    def run(text: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_all_that_is_kept_is_made_by_a_step(steps: list[dict[str, Any]]):
    scripts = "\n".join(step.get("run", "") for step in steps)
    kept = [path for step in steps if "upload" in step.get("uses", "") for path in step["with"]["path"].split()]
    assert len(kept) == 7
    assert all(path.startswith("out/model/") or path.rstrip("/") in scripts for path in kept)


@pytest.mark.slow
def test_the_steps_train_hold_to_limits_and_export(steps: list[dict[str, Any]], shell):
    folder = shell.folder
    for name in ("Train", "Hold it to limits", "Export", "Show the model card"):
        code, said = shell(script(steps, name))
        assert code == 0, (name, said)
    assert json.loads((folder / "train.json").read_text())["ok"]
    assert list((folder / "export" / "gguf").glob("*.gguf"))
    assert "dynlora" in (folder / "summary.md").read_text()
    (folder / "report.json").rename(folder / "baseline.json")
    worse = script(steps, "Hold it to limits").replace("--fail-above 5.2", "--fail-above 1.0")
    assert shell(worse)[0] == 4, "a limit that is missed fails the step"
    assert json.loads((folder / "report.json").read_text()), "what was measured is kept all the same"
    held = shell(script(steps, "Hold it to limits"))
    assert held[0] == 0, held[1]
