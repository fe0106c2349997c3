"""An adapter for mlx-lm, on Apple's processors.

What it does
    Writes adapters.safetensors and adapter_config.json as `mlx_lm.lora` does: lora_a [I, R] and lora_b [R, O] of every
    layer, at one rank and one scale, which is 1. mlx-lm adapts the last so many blocks, each in the same layers; those
    of them that have no component get zeros. Names are those of transformers, but for GPT-2's beginning.

When to use it
    For `mlx_lm.generate --model BASE --adapter-path FOLDER`, and for `mlx_lm.fuse`, with the base as it is on the hub
    or in mlx-community's 4 or 8 bits.

Reference
    mlx-lm 0.32, mlx_lm/tuner/utils.py (load_adapters, linear_to_lora_layers), tuner/lora.py (LoRALinear), LORA.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.exporter import Job, Read, padded, plain_lora
from dynlora_cli.export.stacked import expected_layers
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.whole import write_json

needs_base = True
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
# Model types that were tried in the real mlx-lm: its layers have transformers' names.
MODEL_TYPES = {
    "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3",
}  # fmt: skip
_BLOCK = re.compile(r"(?P<path>.*\.(?:layers|h))\.(?P<number>\d+)\.(?P<rest>.+)")
_OUTSIDE = ("lm_head",)  # layers that stand in no block, and that mlx-lm finds by their whole name


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter.

    Raises:
        UsageError: mlx-lm has no such model, or it would not find a layer; the message names it.
    """
    adapter = plain_lora(job.adapter, "mlx-lm")
    assert job.base_config is not None
    assert job.linear_layers is not None
    _check_model(job)
    first = min((_number(name) for name in adapter.layers), default=0)
    wanted = {name for name in expected_layers(job, adapter.layers, ()) if _number(name) >= first}
    missing = {name: job.linear_layers[name] for name in wanted if name not in adapter.layers}
    wide = padded(adapter, missing)
    tensors = {}
    for name, factors in wide.layers.items():
        tensors[f"{_theirs(name)}.lora_a"] = factors.a_CI.T.contiguous()
        tensors[f"{_theirs(name)}.lora_b"] = factors.b_OC.T.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})
    rank, (keys, blocks) = max(wide.ranks.values()), _keys(job, wide.layers)
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    base = job.adapter.config.get("base_model_name_or_path")
    config = {"model": base, "fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}
    write_json(folder / CONFIG, config)
    job.notes.append("use it with: mlx_lm.generate --model BASE --adapter-path FOLDER --prompt ...")
    return {"rank": rank, "filled_layers": len(missing), "num_layers": blocks, "keys": keys}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The files by mlx-lm's rules: x @ lora_a @ lora_b times the scale, in the layers that the config names.

    Raises:
        DynloraError: mlx-lm would miss a tensor, or make a layer of another rank.
    """
    config, tensors = read_object(folder / CONFIG), load_file(folder / WEIGHTS)
    assert job.linear_layers is not None
    parameters = config["lora_parameters"]
    layers = {}
    for name in _adapted(job, config["num_layers"], set(parameters["keys"])):
        a_IC, b_CO = (tensors.pop(f"{_theirs(name)}.lora_{letter}", None) for letter in "ab")
        d_in, d_out = job.linear_layers[name]
        if a_IC is None or b_CO is None or (a_IC.shape, b_CO.shape) != _shapes(d_in, d_out, parameters["rank"]):
            raise DynloraError(f"mlx-lm would find no factors of the right shape for {name}", "please report this")
        layers[name] = Factors(a_IC.T.contiguous(), parameters["scale"] * b_CO.T.contiguous())
    if tensors:
        raise DynloraError(f"mlx-lm would have no place for {sorted(tensors)[0]}", "please report this")
    return job.adapter.with_layers(layers)


def _shapes(d_in: int, d_out: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (d_in, rank), (rank, d_out)


def _check_model(job: Job) -> None:
    assert job.base_config is not None
    kind = job.base_config.get("model_type")
    hint = "fold it into the base instead: --to merged, which `mlx_lm.convert` reads"
    if kind not in MODEL_TYPES:
        raise UsageError(
            f"model_type {kind!r} was not tried in mlx-lm; supported: {', '.join(sorted(MODEL_TYPES))}", hint
        )
    strange = [n for n in job.adapter.layers if not _BLOCK.fullmatch(n) and n not in _OUTSIDE]
    if strange:
        raise UsageError(f"{job.adapter.folder} adapts {strange[0]}, which mlx-lm would not find", hint)
    if "lm_head" in job.adapter.layers and job.base_config.get("tie_word_embeddings"):
        raise UsageError(f"{job.adapter.folder} adapts lm_head, which mlx-lm's model does not have: it is tied", hint)


def _keys(job: Job, names: Iterable[str]) -> tuple[list[str], int]:
    """What mlx-lm is to adapt: the layers of a block by their names in it, and how many blocks from the last."""
    matches = {name: _BLOCK.fullmatch(name) for name in names}
    inside = {match["rest"] for match in matches.values() if match}
    numbers = [int(match["number"]) for match in matches.values() if match]
    outside = [name for name, match in matches.items() if match is None]
    blocks = _blocks(job) - min(numbers) if numbers else 1  # 0 would mean all
    return sorted(inside) + sorted(outside), blocks


def _adapted(job: Job, blocks: int, keys: set[str]) -> list[str]:
    """Layers of the base that mlx-lm adapts when it is told so."""
    assert job.linear_layers is not None
    first, found = _blocks(job) - blocks, []
    for name in job.linear_layers:
        match = _BLOCK.fullmatch(name)
        if (match and match["rest"] in keys and int(match["number"]) >= first) or name in keys:
            found.append(name)
    return found


def _blocks(job: Job) -> int:
    assert job.linear_layers is not None
    return 1 + max(int(match["number"]) for name in job.linear_layers if (match := _BLOCK.fullmatch(name)))


def _number(name: str) -> int:
    """The block that a layer is in; one that stands outside comes last."""
    match = _BLOCK.fullmatch(name)
    return int(match["number"]) if match else sys.maxsize


def _theirs(name: str) -> str:
    """A layer's name in mlx-lm."""
    return re.sub(r"^transformer\.", "model.", name)
