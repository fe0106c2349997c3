"""DoRA in PEFT's files: a LoRA with a magnitude for each output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.adapters.kind import lora_tensors
from dynlora_cli.lora.dora import DoraLinear
from dynlora_cli.lora.pool import Pool


def saved(pool: Pool, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's own form: a LoRA with a magnitude vector for each layer. A layer without components keeps no magnitude."""
    magnitudes = {
        f"{PREFIX}{name}.lora_magnitude_vector": layer.magnitude_O.detach()
        for name, layer in pool.layers.items()
        if layer.count and isinstance(layer, DoraLinear)
    }
    return {**config, "use_dora": True}, {**lora_tensors(pool), **magnitudes}
