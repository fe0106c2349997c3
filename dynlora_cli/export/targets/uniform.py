"""A PEFT LoRA folder with one rank everywhere.

What it does
    Adds components of zeros until every layer has the largest rank; the update stays the same, and no pattern is
    needed.

When to use it
    For consumers that know one rank for all layers.

Reference
    A LoRA of rank r is a LoRA of any larger rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.exporter import Job, Read, padded, plain_lora
from dynlora_cli.runs.folder import copy_tokenizer

needs_base = False
for_peft = True
DTYPES = ("bf16", "fp8")


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded adapter and its tokenizer."""
    if not job.adapter.layers:
        raise UsageError(f"{job.adapter.folder} has no layers, which could have one rank", "use --to peft, or merged")
    wide = padded(plain_lora(job.adapter, "a consumer of one rank", heads=True))
    save(wide, folder, dtype=job.dtype)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    return {"rank": max(wide.ranks.values()), "parameters_padded": wide.parameters}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The folder; all ranks must be one, without patterns."""
    adapter = read_adapter(folder)
    if len(set(adapter.ranks.values())) != 1 or adapter.config["rank_pattern"] or adapter.config["alpha_pattern"]:
        raise DynloraError("the export has more than one rank", "please report this")
    return adapter
