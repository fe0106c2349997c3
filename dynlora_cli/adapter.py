"""The adapter on disk: a plain PEFT LoRA whose scale is exactly 1 for every module.

s is folded into B, and `lora_alpha = r` globally and per module. So every consumer computes the same update, whichever
of PEFT's patterns it honours: PEFT divides alpha by rank per module, vLLM knows one global ratio, llama.cpp divides by
each tensor's own rank.

Dimensions: C components of a layer, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.run_folder import write_json

PREFIX = "base_model.model."
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def lora_tensors(pool: Pool) -> dict[str, Tensor]:
    """PEFT's names and tensors: lora_A.weight [C, I], lora_B.weight [O, C] with s in it; layers at rank 0 absent."""
    tensors = {}
    for name, layer in pool.layers.items():
        if layer.count:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a_CI.detach()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.scale * layer.b_OC.detach()
    return tensors


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str,
    revision: str | None,
    task: str,
    fan_in_fan_out: bool = False,
    modules_to_save: list[str] | None = None,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        ranks: components per layer; layers at 0 are left out, since PEFT refuses rank 0.
        base_model: folder or hub id that PEFT may load the base from.
        revision: of the base.
        task: as in the recipe.
        fan_in_fan_out: the targets are GPT-2's transposed Conv1D.
        modules_to_save: modules stored whole, such as a classifier head.
    """
    alive = {name: rank for name, rank in ranks.items() if rank}
    largest = max(alive.values())
    # PEFT tries every key for every module: one key for all modules of a rank, each a full, escaped name.
    pattern = {
        "|".join(re.escape(name) for name, r in alive.items() if r == rank): rank
        for rank in sorted(set(alive.values()) - {largest})
    }
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": pattern,
        "revision": revision,
        "target_modules": sorted(alive),
        "task_type": TASK_TYPES[task],
        "use_dora": False,
        "use_rslora": False,
    }


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the bytes depend on the arguments only."""
    on_cpu = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
    # Not `save_file`, which makes files that only their owner can read.
    (folder / "adapter_model.safetensors").write_bytes(save(on_cpu, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)
