"""A LoRA folder for LoRAX.

What it does
    Brings every layer to the largest rank with components of zeros, and fills in layers that have none: LoRAX stacks
    the factors of one module type over all blocks, and silently drops a type that a block lacks.

When to use it
    For LoRAX, and for other servers that batch adapters in stacks.

Reference
    LoRAX, server/lorax_server/adapters/lora.py: LoraWeights.load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynlora_cli.adapter import Adapter, save
from dynlora_cli.adapter_reader import read_adapter
from dynlora_cli.errors import DynloraError
from dynlora_cli.exporters._exporter import Job, Read, padded, plain_lora
from dynlora_cli.run_folder import copy_tokenizer

needs_base = True


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer."""
    adapter = plain_lora(job.adapter, "LoRAX")
    assert job.linear_layers is not None
    used = {_type(name) for name in adapter.layers}
    missing = {
        name: shape for name, shape in job.linear_layers.items() if _type(name) in used and name not in adapter.layers
    }
    wide = padded(adapter, missing)
    save(wide, folder, for_peft=False)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    return {"rank": max(wide.ranks.values()), "filled_layers": len(missing)}


def _type(name: str) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by LoRAX's rules: one rank, and no block without a type that others have."""
    adapter = read_adapter(folder)
    assert job.linear_layers is not None
    used = {_type(name) for name in adapter.layers}
    expected = {name for name in job.linear_layers if _type(name) in used}
    if len(set(adapter.ranks.values())) != 1 or set(adapter.layers) != expected:
        raise DynloraError("LoRAX would drop a module type of the export", "please report this")
    return adapter
