"""The base with the adapter folded in, as one GGUF file for llama.cpp.

What it does
    Writes model.gguf with weights, vocabulary and chat template, in f32, f16 or q8_0 (`--outtype`); norms stay in f32.

When to use it
    For llama.cpp, LM Studio, and everything else that runs GGUF.

Reference
    The GGUF format; see _gguf_arch.py for the architectures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapter import Adapter
from dynlora_cli.exporters._exporter import Job, Read
from dynlora_cli.exporters._gguf import read_model, write_model

needs_base = True
FILE = "model.gguf"


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.gguf."""
    merged = job.merged()
    assert job.tokenizer_folder is not None
    facts = write_model(folder / FILE, merged.config, job.tokenizer_folder, merged.names, merged.read, kind=job.outtype)
    job.notes.extend(facts.pop("notes", []))
    facts.pop("path", None)
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The file's tensors by their names in the base, dequantized and in the base's order."""
    return read_model(folder / FILE, job.merged().config)
