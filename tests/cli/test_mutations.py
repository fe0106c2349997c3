"""Mutated recipes, rows, adapter configs and headers: each is read, or answered in words with the right exit code."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from data_helpers import CHATML, byte_tokenizer, dataset, task_named
from mutated import CONFIG, EXAMPLE, LAYER, RECIPE, ROW, answered, mutations
from safetensors.torch import save

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import read_record
from dynlora_cli.runs.log import read_run

TIMES = 60


@pytest.mark.slow
def test_recipes(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    for content in mutations(RECIPE, 1, TIMES):
        path.write_bytes(content)
        answered(load_recipe, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_rows(tmp_path: Path, name: str):
    path, tokenizer = tmp_path / name, byte_tokenizer(CHATML)
    for content in mutations(ROW, 2, TIMES):
        path.write_bytes(b"[%s]" % content if name == "rows.json" else content + b"\n")
        answered(partial(load_data, task=task_named(), seed=0), dataset(path), tokenizer)


@pytest.mark.parametrize("name", ["adapter_config.json", "dynlora.json", "metrics.jsonl", "rank_events.jsonl"])
def test_run_folders(tmp_path: Path, name: str):
    folder = tmp_path / "run"
    shutil.copytree(EXAMPLE, folder)
    weights = {f"{LAYER}_A.weight": torch.ones(2, 64), f"{LAYER}_B.weight": torch.ones(64, 2)}
    (folder / "adapter_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    lines = (folder / name).read_text().splitlines()
    whole = json.loads(lines[-1] if name.endswith("l") else "".join(lines))
    for content in mutations(whole, 3, TIMES):
        kept = "".join(f"{line}\n" for line in lines[:3]).encode() if name.endswith("l") else b""
        (folder / name).write_bytes(kept + content)
        answered(read_adapter, folder)
        if name != "adapter_config.json":
            answered(read_run, folder)
            answered(read_record, folder)


def test_headers(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    whole = save({f"{LAYER}_A.weight": torch.ones(2, 64), f"{LAYER}_B.weight": torch.ones(64, 2)}, {"format": "pt"})
    end = 8 + int.from_bytes(whole[:8], "little")
    for number, text in enumerate(mutations(json.loads(whole[8:end]), 4, TIMES)):
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
