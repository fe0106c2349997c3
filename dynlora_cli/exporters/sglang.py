"""A LoRA folder for SGLang.

What it does
    Brings every layer to the largest rank with components of zeros, and fills in layers that have none. SGLang joins
    q, k and v of an attention, and gate and up of a feed-forward part, which must be there together and of one rank.

When to use it
    For `python -m sglang.launch_server --enable-lora --lora-paths name=FOLDER`.

Reference
    SGLang 0.5, python/sglang/srt/lora/lora.py: LoRAAdapter.normalize_qkv_proj and normalize_gate_up_proj.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapter import Adapter
from dynlora_cli.errors import DynloraError
from dynlora_cli.exporters._exporter import Job, Read
from dynlora_cli.exporters._stacked import read_stacked, write_stacked

needs_base = True
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer; how to serve it goes to the notes."""
    facts = write_stacked(job, folder, "SGLang", together=JOINED)
    job.notes.append(
        f"serve with: python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths name=FOLDER "
        f"--max-lora-rank {facts['rank']}"
    )
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by SGLang's rules: what it joins is there together, with one rank and one scale."""
    adapter = read_stacked(job, folder, "SGLang", together=JOINED)
    assert job.linear_layers is not None
    for name in adapter.layers:
        parent, _, leaf = name.rpartition(".")
        group = next((group for group in JOINED if leaf in group), ())
        joined = [f"{parent}.{other}" for other in group if f"{parent}.{other}" in job.linear_layers]
        absent = [other for other in joined if other not in adapter.layers]
        if absent:
            raise DynloraError(f"SGLang cannot join {name} with {', '.join(absent)}", "please report this")
    return adapter
