"""A LoRA folder for SGLang.

What it does
    Brings every layer to the largest rank with components of zeros, and fills in layers that have none. SGLang knows
    one rank and one scale, and joins q, k and v of an attention, and gate and up of a feed-forward part: where q is
    there and v is not, it fails; k, up and whole blocks that are absent it takes as zeros. It finds a layer by the
    number after `layers.` and by its own name, so names without a number, and two layers of one name in a block, are
    refused: it would leave the first out, and let the last one win, both without a word.

When to use it
    For `python -m sglang.launch_server --enable-lora --lora-paths name=FOLDER`.

Reference
    SGLang 0.5.23, python/sglang/srt/lora: lora.py (LoRAAdapter._process_weight, normalize_qkv_proj,
    normalize_gate_up_proj), mem_pool.py (load_lora_weight_to_buffer), utils.py (_KNOWN_LORA_TARGET_MODULES).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.stacked import expected_layers, read_stacked, write_stacked

needs_base = True
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# For these every model class of SGLang has shapes; for others only where the class brings its own.
KNOWN = {
    *JOINED[0],
    *JOINED[1],
    *("o_proj", "out_proj", "down_proj", "qkv_proj", "gate_up_proj", "in_proj", "lm_head"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
}


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer; how to serve it goes to the notes.

    Raises:
        UsageError: it adapts layers that SGLang would not find; the message names them.
    """
    if why := _unreadable(job, expected_layers(job, job.adapter.layers, JOINED)):
        hint = "fold it into the base instead: --to merged, or `dynlora merge`"
        raise UsageError(f"{job.adapter.folder}: {why}", hint)
    facts = write_stacked(job, folder, "SGLang", together=JOINED)
    job.notes.append(
        f"serve with: python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths name=FOLDER "
        f"--max-lora-rank {facts['rank']}"
    )
    others = sorted({name.rpartition(".")[2] for name in job.adapter.layers} - KNOWN)
    if others:
        job.notes.append(f"SGLang reads {', '.join(others)} only where its class of this model has shapes for them")
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The folder by SGLang's rules: what it joins is there together, with one rank and one scale."""
    adapter = read_stacked(job, folder, "SGLang", together=JOINED)
    if why := _unreadable(job, set(adapter.layers)):
        raise DynloraError(f"the export: {why}", "please report this")
    return adapter


def _unreadable(job: Job, names: set[str]) -> str:
    """Why SGLang would not compute with every one of these layers; nothing where it would."""
    assert job.linear_layers is not None
    seen: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        block = re.search(r"layers\.(\d+)\.", name)
        if block is None and leaf != "lm_head":
            return f"SGLang would leave out {name} without a word: its name has no `layers.` with a number"
        if leaf == "q_proj" and f"{parent}.v_proj" not in names:
            return f"SGLang joins {name} with {parent}.v_proj, which the base does not have"
        expert = re.search(r"experts\.\d+\.", name)
        place = (block[1] if block else "", (expert[0] if expert else "") + leaf)
        if place in seen:
            return f"SGLang would take {name} in the place of {seen[place]}: it finds layers by block and last name"
        seen[place] = name
    return ""
