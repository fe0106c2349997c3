"""A LoRA folder for LoRAX.

What it does
    Brings every layer to one rank with components of zeros, and fills in layers that have none: LoRAX stacks the
    factors of one module type over all blocks, and silently drops a type that a block lacks. The rank is one that its
    kernels do not fill up further (see `sgmv_rank`).

When to use it
    For LoRAX, and for other servers that batch adapters in stacks.

Reference
    LoRAX, server/lorax_server/adapters/lora.py: LoraWeights.load; utils/sgmv.py: pad_rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.stacked import read_stacked, sgmv_rank, write_stacked

needs_base = True
DTYPES = ("bf16", "fp8")  # LoraWeights.load casts every tensor to the model's type


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer."""
    return write_stacked(job, folder, "LoRAX", rank_rule=sgmv_rank)


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by LoRAX's rules: one rank, and no block without a type that others have."""
    return read_stacked(job, folder, "LoRAX", rank_rule=sgmv_rank)
