"""A base in pytorch_model.bin trains, merges and is told from another one like a base in safetensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file
from tiny_run import make_recipe, train

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.models.fingerprint import changed_since, fingerprint
from dynlora_cli.models.weights import Weights


def config_of(folder: Path) -> dict:
    return read_object(folder / "config.json")


def fingerprint_of(folder: Path) -> dict:
    return fingerprint(folder, config_of(folder))


def pickled(folder: Path, *, shards: int = 1) -> Path:
    """Turn a model's safetensors file into pickles."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names, placed = sorted(state), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in names[shard::shards]}, folder / file)
        placed |= dict.fromkeys(names[shard::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_trained_on_merged_and_told_from_another(shards: int, tmp_path: Path, dynlora: Dynlora):
    plain = make_recipe(tmp_path, "train.max_steps=3", out="plain")
    train(plain)
    base = tmp_path / "llama"
    numbers = load_file(base / "model.safetensors")
    pickled(base, shards=shards)
    train(make_recipe(tmp_path, "train.max_steps=3"))
    run = tmp_path / "out"
    assert (run / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "plain/adapter_model.safetensors"
    ).read_bytes()
    answer = dynlora("merge", "--adapter", run)
    assert answer.code == 0, answer.err
    assert {file.suffix for file in (run / "merged").glob("*model*")} <= {".safetensors", ".json"}
    merged = Weights(run / "merged")
    assert merged.entries.keys() == numbers.keys()
    embeddings = next(name for name in numbers if "embed" in name)
    assert torch.equal(merged.read(embeddings), numbers[embeddings])
    for to in ("merged", "peft"):
        assert dynlora("export", "--adapter", run, "--to", to, "--out", tmp_path / to).code == 0

    other = shutil.copytree(base, tmp_path / "other")
    file = next(other.glob("*.bin"))
    torch.save({name: tensor + 0.01 for name, tensor in torch.load(file).items()}, file)
    for command in (
        ["eval"],
        ["merge", "--out", tmp_path / "made"],
        ["prune", "--budget", "0.5", "--out", tmp_path / "x"],
    ):
        answer = dynlora(*command, "--adapter", run, "--base", other)
        assert answer.code == 2
        assert "is not the model" in answer.err
    shutil.rmtree(base)
    other.rename(base)
    (run / "dynlora.json").write_text((run / "dynlora.json").read_text().replace('"summary"', '"earlier"'))
    answer = dynlora("train", tmp_path / "llama.yaml", "--set", "train.max_steps=3", "--resume")
    assert answer.code == 2
    assert "has changed since" in answer.err


def test_the_record_of_version_0_1_still_fits(tmp_path: Path):
    make_recipe(tmp_path)
    base = tmp_path / "llama"
    safetensors = fingerprint_of(base)
    pickled(base)
    now = fingerprint_of(base)
    assert changed_since(now, base, config_of(base)) is None
    assert changed_since(safetensors, base, config_of(base)) is not None
    (base / "pytorch_model.bin").rename(tmp_path / "aside")
    with pytest.raises(UsageError, match="holds no"):
        fingerprint_of(base)
    (tmp_path / "aside").rename(base / "pytorch_model.bin")
    # What version 0.1 wrote: over the config alone.
    import hashlib

    config = json.loads((base / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    old = {
        "sha256": hashlib.sha256(json.dumps([config, {}], sort_keys=True).encode()).hexdigest(),
        "sampled_sha256": hashlib.sha256().hexdigest(),
        "shards": {},
    }
    assert changed_since(old, base, config_of(base)) is None


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["code", "old", "transposed", "cut", "empty", "list"])
def test_what_cannot_be_read_is_refused_before_training(kind: str, tmp_path: Path, dynlora: Dynlora):
    make_recipe(tmp_path, "train.max_steps=3")
    file = pickled(tmp_path / "llama") / "pytorch_model.bin"
    state = torch.load(file)
    if kind == "code":
        torch.save({**state, "x": Code(tmp_path / "ran")}, file)
    elif kind == "old":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "transposed":
        torch.save({name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in state.items()}, file)
    elif kind == "list":
        torch.save(list(state.values()), file)
    else:
        file.write_bytes(file.read_bytes()[: 0 if kind == "empty" else 5000])
    answer = dynlora("train", tmp_path / "llama.yaml")
    assert answer.code == 2
    assert "pytorch_model.bin" in answer.err
    assert "hint:" in answer.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
