"""A merge method with an option of its own is one new file: the tutorial's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from peft_adapters import exact_delta, make
from tutorials import code_of

from dynlora_cli.adapters.read import read_adapter

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path, plug_in: Callable[..., Path]) -> Pair:
    """Two adapters of one base; the tutorial's method is there."""
    (code,) = code_of("methods").values()
    plug_in("methods", "loudest", code)
    base, first = make("patterns", tmp_path)
    first = first.rename(tmp_path / "one")
    (tmp_path / "b").mkdir()
    _, second = make("lora", tmp_path / "b")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return first, second


def merged(dynlora: Dynlora, pair: Pair, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The updates that the method makes of both, at a budget that cuts nothing off."""
    adapters = (word for folder in pair for word in ("--adapter", folder))
    arguments = (*adapters, "--method", "loudest", "--weights", "1,-0.5", "--budget", "2M", *more)
    answer = dynlora("merge", *arguments, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["method"] == "loudest"
    assert answer.json["peft_check"]["checked"]
    return {name: exact_delta(factors) for name, factors in read_adapter(out).layers.items()}


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_its_entries_are_those_of_plain_numbers(floor: float, pair: Pair, tmp_path: Path, dynlora: Dynlora):
    found = merged(dynlora, pair, tmp_path / "out", *([f"--set=floor={floor}"] if floor else []))
    one, two = ({n: exact_delta(f) for n, f in read_adapter(folder).layers.items()} for folder in pair)
    assert found.keys() == one.keys() | two.keys()
    for name, delta in found.items():
        mine, other = one.get(name, torch.zeros_like(delta)), -0.5 * two.get(name, torch.zeros_like(delta))
        expected = torch.where(mine.abs() >= other.abs(), mine, other)
        expected = torch.where(expected.abs() >= floor * expected.abs().max(), expected, 0.0)
        rounding = 64 * torch.finfo(torch.float32).eps * expected.norm().item()  # of an SVD of 64 directions, and back
        torch.testing.assert_close(delta, expected, rtol=0, atol=rounding)
    summary = json.loads((tmp_path / "out" / "dynlora.json").read_text())["summary"]
    assert summary["options"] == {"floor": floor}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "loudest", "--set", "flor=0.5"), "did you mean 'floor'"),
        (("--method", "loudest", "--set", "floor=1"), "got 1, must be"),
        (("--method", "loudest", "--set", "floor=much"), "must be"),
        (("--method", "loudest", "--set", "floor"), "must be written KEY=VALUE"),
        (("--method", "ties", "--set", "floor=0.5"), "merge method ties has no option 'floor'"),
        (("--method", "loudes"), "did you mean 'loudest'"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: tuple[str, ...], words: str, pair: Pair, tmp_path: Path, dynlora: Dynlora
):
    answer = dynlora("merge", "--adapter", pair[0], "--adapter", pair[1], "--out", tmp_path / "out", *arguments)
    assert (answer.code, words in " ".join(answer.err.split())) == (2, True), answer.err


def test_options_of_a_single_adapter_are_not_passed_over(pair: Pair, dynlora: Dynlora):
    answer = dynlora("merge", "--adapter", pair[0], "--method", "loudest", "--set", "floor=0.5")
    assert answer.code == 2
    assert "there is one" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "--adapter", "a", "--adapter", "b", "--out", "c", "--set", "floor=0.5"),
        ("export", "--adapter", "a", "--to", "peft", "--out", "c", "--set", "level=3"),
    ],
    ids=["merge", "export"],
)
def test_a_wrong_option_is_told_before_torch_loads(arguments: tuple[str, ...], tmp_path: Path):
    code = (
        "import sys; from dynlora_cli.cli import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit as end: sys.exit(end.code if 'torch' not in sys.modules else 'torch was loaded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "has no option" in done.stderr
