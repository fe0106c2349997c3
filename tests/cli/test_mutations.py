"""Mutated recipes, rows, adapter configs and headers: each is read, or answered in words with the right exit code."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import CHATML, byte_tokenizer, dataset, task_named
from safetensors.torch import save

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.runs.folder import read_record
from dynlora_cli.runs.log import read_run

TIMES = 60
VALUES: list[Any] = [
    None, True, -1, 0, 3.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x1b]0;x\x07", "\u0000", "../../x",
    "(a+)+$", [], {}, [[]], {"a": 1}, "a" * 5000,
]  # fmt: skip
RECIPE = {
    "model": {"name_or_path": "builtin:tiny", "dtype": "float32"},
    "dataset": {"train": [{"path": "rows.jsonl", "format": "completion"}], "val_size": 0.1, "max_length": 32},
    "rank": {"init": 8, "budget": 2},
    "pruning": {"start": 0.2, "events": 3},
    "train": {"max_steps": 3, "learning_rate": 1e-3, "betas": [0.9, 0.99]},
    "output_dir": "out",
}
ROW = {"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "c"}], "weight": 1.0}
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 4}, "target_modules": ["q_proj"], "modules_to_save": None, "bias": "none",
    "use_rslora": False, "use_dora": False, "base_model_name_or_path": "builtin:tiny", "fan_in_fan_out": False,
}  # fmt: skip
EXAMPLE = Path(__file__).parents[1] / "fixtures" / "run_example"


def changed(value: Any, chance: random.Random) -> Any:
    """The value with one thing in it changed: another type, a key gone, or another name."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, value = chance.choice(list(value)), dict(value)
        match chance.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[f"\x1b{key}"] = value.pop(key)
            case _:
                value[key] = changed(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with a flipped bit, cut off, zeroed, doubled, or with many brackets in between."""
    at = chance.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    zeroed = content[:at] + bytes(len(content) - at)
    deep = content[:at] + chance.choice([b"[", b'{"a":']) * 20_000 + content[at:]
    return chance.choice([flipped, flipped, content[:at], zeroed, deep, content[at:] + content])


def mutations(content: dict[str, Any], seed: int) -> Iterator[bytes]:
    """JSON texts, two thirds with changed values and the rest with changed bytes."""
    chance = random.Random(seed)
    for number in range(TIMES):
        text = json.dumps(changed(content, chance)).encode()
        yield text if number % 3 else damaged(text, chance)


def answered(read: Any, *arguments: Any) -> None:
    """Reading works, or is refused with an exit code that says that the input must change, in text for a terminal."""
    error = None
    try:
        read(*arguments)
    except DynloraError as refused:
        error = refused
    assert error is None or error.exit_code in (2, 3, 4), error
    assert error is None or "\x1b" not in f"{error.message}{error.hint}"


@pytest.mark.slow
def test_recipes(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    for content in mutations(RECIPE, 1):
        path.write_bytes(content)
        answered(load_recipe, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_rows(tmp_path: Path, name: str):
    path, tokenizer = tmp_path / name, byte_tokenizer(CHATML)
    for content in mutations(ROW, 2):
        path.write_bytes(b"[%s]" % content if name == "rows.json" else content + b"\n")
        answered(partial(load_data, task=task_named(), seed=0), dataset(path), tokenizer)


@pytest.mark.parametrize("name", ["adapter_config.json", "dynlora.json", "metrics.jsonl", "rank_events.jsonl"])
def test_run_folders(tmp_path: Path, name: str):
    folder = tmp_path / "run"
    shutil.copytree(EXAMPLE, folder)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    weights = {f"{prefix}_A.weight": torch.ones(2, 64), f"{prefix}_B.weight": torch.ones(64, 2)}
    (folder / "adapter_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    lines = (folder / name).read_text().splitlines()
    whole = json.loads(lines[-1] if name.endswith("l") else "".join(lines))
    for content in mutations(whole, 3):
        kept = "".join(f"{line}\n" for line in lines[:3]).encode() if name.endswith("l") else b""
        (folder / name).write_bytes(kept + content)
        answered(read_adapter, folder)
        if name != "adapter_config.json":
            answered(read_run, folder)
            answered(read_record, folder)


def test_headers(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    whole = save({f"{prefix}_A.weight": torch.ones(2, 64), f"{prefix}_B.weight": torch.ones(64, 2)}, {"format": "pt"})
    end = 8 + int.from_bytes(whole[:8], "little")
    for number, text in enumerate(mutations(json.loads(whole[8:end]), 4)):
        size = len(text) if number % 5 else random.Random(number).getrandbits(64)
        (tmp_path / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + text + whole[end:])
        answered(read_adapter, tmp_path)


def test_layers_whose_names_a_terminal_would_obey(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    prefix = "base_model.model.layers.0\x1bc.q_proj.lora"
    weights = {f"{prefix}_A.weight": torch.ones(2, 64), f"{prefix}_B.weight": torch.ones(64, 2)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    with pytest.raises(UsageError, match="holds control characters"):
        read_adapter(tmp_path)
