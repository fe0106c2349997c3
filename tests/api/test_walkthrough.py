"""The notebook of recipes/ runs from top to bottom in an empty folder; what a kernel shows while a run goes on."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pico import pico_recipe

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_walkthrough", ROOT / "scripts" / "make_walkthrough.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept() -> dict[str, Any]:
    return json.loads((ROOT / "recipes" / "walkthrough.ipynb").read_text(encoding="utf-8"))


def kinds(cells: Any) -> list[list[tuple[str, ...]]]:
    """What each cell shows: kinds of its outputs, and their forms. What it prints may come in any number of pieces."""
    return [
        [kind for kind, _ in groupby((one["output_type"], *sorted(one.get("data", ()))) for one in cell["outputs"])]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_what_is_kept_tells_nothing_of_a_machine():
    text = json.dumps(kept())
    assert not re.search(r"/(home|tmp|work|usr|root)\b", text)
    assert not re.search(r"\d (ms|s|min)\b|tok/s", re.sub(r"in about a minute", "", text))
    assert all(cell["outputs"] for cell in kept()["cells"] if cell["cell_type"] == "code")
    assert 12 <= len(kept()["cells"]) <= 18


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(maker: ModuleType, tmp_path: Path):
    notebook = maker.executed(tmp_path)
    maker.without_chance(notebook)
    assert kinds(notebook.cells) == kinds(kept()["cells"])
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_stop_button_saves(maker: ModuleType, tmp_path: Path):
    from nbformat.v4 import new_code_cell, new_notebook

    pico_recipe(tmp_path)
    cell = """
        import os, signal
        from dynlora_cli import api
        def listen(event):
            if event["event"] == "tick" and event["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)
        try:
            api.train("recipe.yaml", progress=listen)
        except api.Interrupted as error:
            print(error.exit_code, error.message)
        print(api.train("recipe.yaml", resume=True).summary["steps"])
    """
    lines = "\n".join(line.removeprefix("        ") for line in cell.strip("\n").splitlines())
    notebook = maker.executed(tmp_path, new_notebook(cells=[new_code_cell(lines)]))
    said = "".join(output["text"] for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    assert re.fullmatch(r"130 interrupted after step [34] of 6; everything is saved\n6\n", said)
    (shown,) = [output for output in notebook.cells[0].outputs if output["output_type"] == "display_data"]
    assert "steps done" in shown["data"]["text/html"]  # the picture of a run that has ended


@pytest.mark.slow
def test_the_page_for_newcomers_runs(tmp_path: Path):
    page = (ROOT / "docs" / "howto" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recipe: rank.budgett: unknown key; did you mean 'budget'?" in done.stdout
