"""Arguments that no shell could give: of another type, of NumPy, with ~ in them, empty."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynlora_cli import api
from dynlora_cli.cli import asked
from dynlora_cli.config.arguments import option
from dynlora_cli.errors import UsageError

WRONG: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (api.train, {"recipe": {}, "output_dir": 3}),
    (api.train, {"recipe": {}, "output_dir": b"out"}),
    (api.train, {"recipe": {}, "resume_from": 3}),
    (api.train, {"recipe": {}, "resume": "yes"}),
    (api.train, {"recipe": {}, "set": 3}),
    (api.train, {"recipe": {}, "set": [("rank.budget", 4)]}),
    (api.prune, {"adapter": "a", "budget": 0.5, "out": None}),
    (api.prune, {"adapter": "a", "out": "b", "budget": [1]}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "policy": None}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "heal": -1}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "heal": 2.5}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "max_samples": 0}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "seed": None}),
    (api.prune, {"adapter": "a", "out": "b", "budget": "auto", "tolerance": None}),
    (api.prune, {"adapter": "a", "out": "b", "budget": 0.5, "data": [{"text": "x"}]}),
    (api.merge, {"adapter": ["a", "b"], "weights": [math.nan, 1]}),
    (api.merge, {"adapter": "a", "max_kl": None}),
    (api.merge, {"adapter": "a", "max_kl": math.nan}),
    (api.merge, {"adapter": "a", "density": "x"}),
    (api.merge, {"adapter": "a", "dtype": torch.bfloat16}),
    (api.merge, {"adapter": []}),
    (api.export, {"adapter": "a", "out": "b", "to": 3}),
    (api.export, {"to": "vllm-library", "out": "b", "library": 3}),
    (api.evaluate, {"adapter": []}),
    (api.evaluate, {"adapter": "a", "recipe": {}}),
    (api.evaluate, {"adapter": "a", "also": ["rows.jsonl"]}),
    (api.evaluate, {"adapter": "a", "also": {"general": 3}}),
    (api.evaluate, {"adapter": "a", "tasks": 3}),
    (api.evaluate, {"adapter": "a", "generate": "many"}),
    (api.inspect, {"adapter": []}),
    (api.load, {"adapter": "a", "base": 3}),
]


@pytest.mark.parametrize(("function", "given"), WRONG)
def test_what_no_option_takes_is_refused_by_its_name(function: Callable[..., Any], given: dict[str, Any]):
    with pytest.raises(UsageError) as error:
        function(**given)
    assert error.value.message.startswith(f"{list(given)[-1]}"), error.value.message
    assert " got " in error.value.message


def test_a_keyword_that_is_unknown_is_a_type_error_of_the_function():
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'outputdir'"):
        api.train({}, outputdir="x")  # type: ignore[call-arg]


def test_numbers_of_others_become_pythons_own():
    assert type(option("heal", np.int64(3))) is int
    assert type(option("budget", np.float32(0.5))) is float
    assert option("measure", np.bool_(True)) is True
    assert option("weights", np.array([1.0, 0.5])) == [1.0, 0.5]
    assert option("max_kl", torch.tensor(0.5)) == 0.5
    assert asked.settings({"rank.budget": np.int64(4), "train.learning_rate": np.float64(1e-3)}) == [
        "rank.budget=4",
        "train.learning_rate=0.001",
    ]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert option("out", Path("~/small")) == str(tmp_path / "small")
    for given in ("~/mine.yaml", Path("~/mine.yaml")):
        with pytest.raises(UsageError, match=f"no recipe at {tmp_path}/mine.yaml"):
            api.train(given)
    with pytest.raises(UsageError, match=f"{tmp_path}/mine does not exist"):
        api.inspect("~/mine")
    with pytest.raises(UsageError, match="this machine has no such user"):
        option("out", "~nobody-of-that-name/x")


def test_settings_that_no_recipe_can_hold_are_named():
    with pytest.raises(UsageError, match=r"dataset\.train: got a set, which no recipe can hold"):
        asked.settings({"dataset.train": {"rows.jsonl"}})
    assert asked.settings({"dataset.train": (Path("rows.jsonl"),)}) == ['dataset.train=["rows.jsonl"]']
