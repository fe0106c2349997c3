"""HiRA in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.kind import COPY_AGAIN, ONLY_LORA, Parts, lora_tensors, some
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool


def hira_layers(adapter: Adapter, parts: Parts) -> dict[str, Factors]:
    """The factors of a HiRA; components of zeros, which change nothing, are left out.

    Raises:
        UsageError: a layer is no linear one, or incomplete.
    """
    layers = {}
    for module, tensors in parts.items():
        if tensors.keys() != {"hira_A", "hira_B"}:
            raise UsageError(f"{adapter.folder}: layer {module} lacks its hira_A or hira_B", COPY_AGAIN)
        a, b = tensors["hira_A"], tensors["hira_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UsageError(f"{adapter.folder}: layer {module} has factors {tuple(a.shape)} and {tuple(b.shape)}")
        alive_C = a.any(1) | b.any(0)
        layers[module] = Factors(a[alive_C], b[:, alive_C], hadamard=True)
    return some(layers, adapter)


def hira_form(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a LoRA as PEFT's HIRA has them.

    All layers are filled up to the largest rank with components of zeros, since PEFT does not heed HiRA's
    `rank_pattern` at linear layers (0.21, tuners/hira/layer.py: dispatch_default).
    """
    rank, form = config["r"], {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            form[name.replace(".lora_A.weight", ".hira_A")] = F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif name.endswith(".lora_B.weight"):
            form[name.replace(".lora_B.weight", ".hira_B")] = F.pad(tensor, (0, rank - tensor.shape[1]))
        else:
            form[name] = tensor
    written = {key: value for key, value in config.items() if key not in ONLY_LORA}
    return written | {"peft_type": "HIRA", "hira_dropout": 0.0, "init_weights": True, "rank_pattern": {}}, form


def saved(pool: Pool, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's own form."""
    return hira_form(config, lora_tensors(pool))
