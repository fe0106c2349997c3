"""A PEFT LoRA folder: the adapter as it is, with its ranks per layer.

What it does
    Writes adapter_config.json and adapter_model.safetensors with `lora_alpha = r` for every module, so that the scale
    is exactly 1, and the tokenizer. Foreign adapters (rsLoRA, patterns) come out in this form too.

When to use it
    For PEFT, transformers, TGI, and everything that loads PEFT folders and honours rank_pattern.

Reference
    PEFT's LoraConfig; what it computes is checked by PEFT itself where that is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import DynloraError
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.peft_rules import scales_of
from dynlora_cli.runs.folder import copy_tokenizer

needs_base = False
for_peft = True
DTYPES = ("bf16", "fp8")


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the adapter and its tokenizer."""
    save(job.adapter, folder, dtype=job.dtype)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    return {"largest_rank": max(job.adapter.ranks.values(), default=0)}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder as PEFT understands it: its own config class finds the rank and the scale of every module."""
    adapter = read_adapter(folder)
    if importlib.util.find_spec("peft") is None:
        job.notes.append("PEFT is not installed; its rules were followed instead of asking it")
        return adapter
    if not adapter.layers:  # rows have no scale
        return adapter
    wrong = {name: scale for name, scale in scales_of(folder, adapter).items() if scale != 1.0}
    if wrong:
        raise DynloraError(f"PEFT reads another scale than 1: {wrong}", "please report this")
    return adapter
