"""A LoRA folder for vLLM.

What it does
    Writes the adapter compactly, with `r = lora_alpha =` the largest rank: vLLM divides one global alpha by one global
    r and knows no patterns, and at scale 1 they do not matter. Tells which `--max-lora-rank` to start it with.

When to use it
    For `vllm serve --enable-lora --lora-modules name=FOLDER`.

Reference
    vLLM's PEFTHelper (lora/peft_helper.py): which settings it refuses, and how it finds the scale.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.exporter import Job, Read, plain_lora
from dynlora_cli.runs.folder import copy_tokenizer

needs_base = False
DTYPES = ("bf16", "fp8")  # LoRAModel.from_lora_tensors casts every tensor to the type that it serves in
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the adapter and its tokenizer; the rank to serve with goes to the notes."""
    adapter = plain_lora(job.adapter, "vLLM")
    largest = max(adapter.ranks.values())
    allowed = next((rank for rank in MAX_LORA_RANKS if rank >= largest), None)
    if allowed is None:
        raise UsageError(
            f"a layer has rank {largest}, and vLLM goes to {MAX_LORA_RANKS[-1]}", "prune it first, or use --to merged"
        )
    save(adapter, folder, for_peft=False, dtype=job.dtype)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    job.notes.append(f"serve with: vllm serve BASE --enable-lora --lora-modules NAME=FOLDER --max-lora-rank {allowed}")
    return {"largest_rank": largest, "max_lora_rank": allowed}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The folder by vLLM's rules: one scale, lora_alpha / r, for all layers, whatever the patterns say."""
    adapter = read_adapter(folder)
    config = adapter.config
    refused = [key for key in ("modules_to_save", "use_dora", "use_rslora") if config.get(key)]
    if refused or config["bias"] != "none" or config["r"] < max(adapter.ranks.values()):
        raise DynloraError(f"vLLM would refuse the export: {refused or config}", "please report this")
    scale = config["lora_alpha"] / config["r"]
    layers = {
        name: replace(factors, b_OC=factors.b_OC / factors.scale * scale) for name, factors in adapter.layers.items()
    }
    return adapter.with_layers(layers)
