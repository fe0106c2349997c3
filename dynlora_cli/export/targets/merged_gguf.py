"""The base with the adapter folded in, as one GGUF file for llama.cpp.

What it does
    Writes model.gguf with weights, vocabulary and chat template, in f32, f16 or q8_0 (`--outtype`); norms stay in f32.
    Smaller formats, such as q4_k_m, are made of f16 by llama.cpp's own quantizer, where that is on the machine.

When to use it
    For llama.cpp, LM Studio, and everything else that runs GGUF.

Reference
    The GGUF format; see export/gguf/architectures.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.gguf.file import read_model
from dynlora_cli.export.gguf.merged import FILE, write_merged_gguf

needs_base = True
OUTTYPE = True


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.gguf."""
    return write_merged_gguf(job, folder)


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The file's tensors by their names in the base, dequantized and in the base's order."""
    return read_model(folder / FILE, job.merged().config)
