"""A LoRA folder for Text Generation Inference (TGI).

What it does
    Brings every layer to one rank with components of zeros, and fills in layers that have none: TGI stacks the factors
    of one module type over all blocks, and drops a type that a block lacks. The rank is one that its kernels do not
    fill up further (see `sgmv_rank`). TGI looks for a fixed list of names and passes over all others without a word, so
    an adapter of other layers is refused.

When to use it
    For `text-generation-launcher --model-id BASE --lora-adapters name=FOLDER`.

Reference
    TGI, server/text_generation_server: utils/adapter.py (build_layer_weight_lookup), adapters/lora.py
    (LoraWeights.prepare_weights, which came from LoRAX), models/__init__.py (get_model_with_lora_adapters).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.stacked import read_stacked, sgmv_rank, write_stacked

needs_base = True
READ = re.compile(
    r"model\.layers\.(\d+)\.(self_attn\.(q_proj|k_proj|v_proj|qkv_proj|o_proj)"
    r"|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))"
)


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer; how to serve it goes to the notes.

    Raises:
        UsageError: it adapts layers that TGI does not read; the message names them.
    """
    passed_over = _passed_over(job, job.adapter)
    if passed_over:
        raise UsageError(
            f"{job.adapter.folder} adapts {_some(passed_over)}, which TGI would leave out without a word",
            "fold it into the base instead: --to merged, or `dynlora merge`",
        )
    facts = write_stacked(job, folder, "TGI", rank_rule=sgmv_rank)
    job.notes.append(
        "serve with: text-generation-launcher --model-id BASE --lora-adapters name=FOLDER "
        f"(on up to {facts['rank'] // 8} shards: on more, TGI itself changes the scale)"
    )
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by TGI's rules: one rank, and no block without a type that others have."""
    adapter = read_stacked(job, folder, "TGI", rank_rule=sgmv_rank)
    if passed_over := _passed_over(job, adapter):
        raise DynloraError(f"TGI would leave out {_some(passed_over)}", "please report this")
    return adapter


def _passed_over(job: Job, adapter: Adapter) -> list[str]:
    """Layers of names that TGI does not look for, or of a type that not every block of the base has."""
    assert job.linear_layers is not None
    blocks: dict[str, set[str]] = {}
    for name in job.linear_layers:
        if match := READ.fullmatch(name):
            blocks.setdefault(match[2], set()).add(match[1])
    every = set().union(*blocks.values())
    found = {name: READ.fullmatch(name) for name in adapter.layers}
    return [name for name, match in found.items() if match is None or blocks.get(match[2]) != every]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
