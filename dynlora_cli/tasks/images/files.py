"""The file by which a pipeline of diffusers loads a run: `pipe.load_lora_weights(FOLDER)`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from dynlora_cli.files.whole import sync, unfinished

PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
FILE = "pytorch_lora_weights.safetensors"


def write_for_pipeline(folder: Path, model: Any) -> None:
    """Write the adapter in a folder a second time, as diffusers names its tensors.

    Args:
        folder: with an adapter of scale 1, as every run saves it.
        model: the denoiser; says what its pipeline calls it.
    """
    tensors = load((folder / PEFT_FILE).read_bytes())
    named = {name.replace(PEFT_PREFIX, f"{model.part}.", 1): tensor for name, tensor in tensors.items()}
    ranks = {
        name.removesuffix(".lora_A.weight").removeprefix(f"{model.part}."): len(tensor)
        for name, tensor in named.items()
        if name.endswith(".lora_A.weight")
    }
    said = {
        f"{model.part}.r": max(ranks.values(), default=1),
        f"{model.part}.lora_alpha": max(ranks.values(), default=1),
        f"{model.part}.rank_pattern": ranks,
        f"{model.part}.alpha_pattern": ranks,
        f"{model.part}.target_modules": sorted(ranks),
    }
    plain = {name: tensor.contiguous().to(torch.float32) for name, tensor in named.items()}
    temporary = unfinished(folder / FILE)
    save_file(plain, temporary, {"format": "pt", "lora_adapter_metadata": json.dumps(said, sort_keys=True)})
    sync(temporary)
    temporary.replace(folder / FILE)
