"""Two processes train a hypernetwork as one with twice the batch, and go on from a checkpoint as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypernet_runs import document_recipe, hypernet_recipe
from numeric import same_curve
from processes_helper import two
from safetensors.torch import load_file
from tiny_run import lines

from dynlora_cli.config.load import to_yaml
from dynlora_cli.runs.folder import read_record

pytestmark = pytest.mark.slow

FILES = ("hypernet.json", "hypernet.safetensors")
# What a process drops it draws for itself, so without it: other numbers would be no fault.
SCRIPT = """
import json, sys
from pathlib import Path
from torch import nn
from tiny_run import train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.errors import Interrupted

path, drops, interrupt_at, resume, *overrides = sys.argv[1:]
if drops == "no":
    nn.Dropout.forward = lambda self, x: x
recipe = load_recipe(Path(path), overrides)
try:
    summary, _ = train(recipe, interrupt_at=int(interrupt_at) or None, resume=resume == "yes")
    print(json.dumps({key: summary[key] for key in ("loss_before", "loss_after", "steps")}))
except Interrupted:
    print(json.dumps("interrupted"))
"""
RECIPES = {
    "text-gated": lambda folder: hypernet_recipe(folder),
    "text-to-lora": lambda folder: hypernet_recipe(folder, variant="text-to-lora"),
    "doc-to-lora": lambda folder: document_recipe(folder),
}


def run(
    folder: Path,
    variant: str,
    out: str,
    *overrides: str,
    processes: int = 2,
    drops: str = "no",
    interrupt_at: int = 0,
    resume: str = "no",
) -> Any:
    """What the first process says of a run; its recipe, rows and base are written once, and not by two at a time."""
    path = folder / f"{variant}.yaml"
    if not path.is_file():
        path.write_text(to_yaml(RECIPES[variant](folder)), encoding="utf-8")
    more = (f"output_dir={folder / out}", *overrides)
    said = two(SCRIPT, str(path), drops, str(interrupt_at), resume, *more, folder=folder, processes=processes)
    return json.loads(said.splitlines()[-1])


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "metrics.jsonl") if line["event"] == "train"]


@pytest.mark.parametrize(
    "variant", [name if name == "text-gated" else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, variant: str):
    """Of 4 rows in a micro-batch: the last step of a pass has too few for both, so one process has nothing to learn."""
    parts = ("train.micro_batch_size=4", "train.gradient_accumulation_steps=2", "train.max_steps=14")
    one = run(tmp_path, variant, "one", *parts, processes=1)
    both = run(tmp_path, variant, "two", *parts)
    assert both["steps"] == one["steps"] == 14
    assert both["loss_before"] == pytest.approx(one["loss_before"], rel=1e-5)
    assert both["loss_after"] == pytest.approx(one["loss_after"], rel=1e-3)
    assert losses(tmp_path / "two")
    assert losses(tmp_path / "two") == same_curve(losses(tmp_path / "one"))
    files = [load_file(tmp_path / out / FILES[1]) for out in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert (files[1][name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert [read_record(tmp_path / out)["processes"] for out in ("one", "two")] == [1, 2]


@pytest.mark.parametrize("variant", ["text-gated", "doc-to-lora"])
def test_two_processes_go_on_from_a_checkpoint(tmp_path: Path, variant: str):
    whole = run(tmp_path, variant, "whole", drops="yes")
    assert run(tmp_path, variant, "cut", drops="yes", interrupt_at=6) == "interrupted"
    assert run(tmp_path, variant, "cut", drops="yes", resume="yes") == whole
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "cut" / "metrics.jsonl")
