"""A LoRA folder for Text Generation Inference (TGI).

What it does
    Brings every layer to the largest rank with components of zeros, and fills in layers that have none: TGI stacks the
    factors of one module type over all blocks and asks for each of them.

When to use it
    For `text-generation-launcher --model-id BASE --lora-adapters name=FOLDER`.

Reference
    TGI, server/text_generation_server/adapters/lora.py: LoraWeights.prepare_weights, which came from LoRAX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapter import Adapter
from dynlora_cli.exporters._exporter import Job, Read
from dynlora_cli.exporters._stacked import read_stacked, write_stacked

needs_base = True


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer; how to serve it goes to the notes."""
    facts = write_stacked(job, folder, "TGI")
    job.notes.append("serve with: text-generation-launcher --model-id BASE --lora-adapters name=FOLDER")
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by TGI's rules: one rank, and no block without a type that others have."""
    return read_stacked(job, folder, "TGI")
