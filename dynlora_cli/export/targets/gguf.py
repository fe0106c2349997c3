"""The adapter as a GGUF file for llama.cpp.

What it does
    Writes adapter.gguf, every layer at the largest rank, filled with zeros, and alpha = that rank: llama.cpp divides
    alpha by each tensor's own rank. Rows of q and k are put in the order that llama.cpp's rotary embedding has.

When to use it
    For `llama-server -m base.gguf --lora adapter.gguf`, where one base serves several adapters.

Reference
    llama.cpp: docs of convert_lora_to_gguf.py; src/llama-adapter.h, get_scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.export.exporter import Job, Read, plain_lora
from dynlora_cli.export.gguf.file import read_adapter, write_adapter

needs_base = True
FILE = "adapter.gguf"


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write adapter.gguf."""
    adapter = plain_lora(job.adapter, "llama.cpp")
    assert job.base_config is not None
    facts = write_adapter(
        folder / FILE, job.base_config, {name: (f.a_CI, f.b_OC) for name, f in adapter.layers.items()}
    )
    job.notes.extend(facts.pop("notes", []))
    facts.pop("path", None)
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The file by llama.cpp's rules: alpha divided by each tensor's own rank."""
    assert job.base_config is not None
    found = read_adapter(folder / FILE, job.base_config)
    return job.adapter.with_layers({name: Factors(a, b) for name, (a, b) in found.items()})
