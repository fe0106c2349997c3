"""The scripts in recipes/trainers/ run as they stand, and do what they are for."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path
from statistics import mean

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from trl_helpers import ROWS, load

ROOT = Path(__file__).parents[2]
IDS = torch.arange(2, 26).view(2, 12)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "key"), [("sft", "loss"), ("dpo", "loss"), ("grpo", "reward")])
def test_the_example_trains_and_prunes(tmp_path, monkeypatch, name, key):
    path = ROOT / "recipes" / "trainers" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = runpy.run_path(str(path), run_name="__main__")
    attached, trainer = done["attached"], done["trainer"]
    assert attached.parameters <= attached.start.budget < attached.start.parameters
    assert len(set(attached.rank_map.values())) > 1
    found = [line[key] for line in trainer.state.log_history if key in line]
    better = [-value for value in found] if key == "loss" else found
    assert mean(better[-2:]) > better[0]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / f"trl-{name}", dtype=torch.float32).eval()
    with torch.no_grad():
        assert loaded(IDS).logits == pytest.approx(trainer.model.eval()(IDS).logits, abs=1e-4)


def test_what_the_page_says_runs(tmp_path, monkeypatch):
    """The Python of docs/howto/trainers.md from top to bottom, on a tiny model and the CPU."""
    page = (ROOT / "docs" / "howto" / "trainers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace(
        'Config("out', 'Config(use_cpu=True, report_to="none", logging_steps=1, output_dir="out'
    )
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS * 3]
    names = {"model": load(tmp_path), "rows": Dataset.from_list(rows)}
    names |= {"other": load(tmp_path), "preferences": Dataset.from_list(ROWS * 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "trainers.md", "exec"), names)
    assert names["callback"].rank_events[-1]["ranks"] == names["callback"].attached.rank_map
    assert names["attached"].parameters < names["attached"].start.parameters
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_each_is_about_thirty_lines():
    for path in (ROOT / "recipes" / "trainers").glob("*.py"):
        code = [line for line in path.read_text().split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) <= 36, path.name
