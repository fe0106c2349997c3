"""HiRA: components multiply the weight, entry by entry, without any scale.

    W' = W ∘ (1 + ΔW)

Source: Huang et al. 2025, HiRA (ICLR 2025, openreview TwJrTz9cRS), equation 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.kind import COPY_AGAIN, ONLY_LORA, Files, Own, Parts, Read, refuse_zeros
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.hira import HiraLinear

title = "HiRA"
tensors = ("hira_A", "hira_B")
multiplies = True


def read(adapter: Adapter, parts: Parts, _base: str | None) -> dict[str, Factors]:
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
        layers[module] = Factors(a[alive_C], b[:, alive_C], kind="hira")
    return refuse_zeros(layers, adapter)


def written(config: dict[str, Any], tensors: dict[str, Tensor], _own: Own) -> Files:
    """A LoRA's files as PEFT's HIRA has them.

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


def layer(base: nn.Module, factors: Factors, weight: Read, _bias: Read) -> HiraLinear:
    """The layer that computes with W', without having it in memory."""
    return HiraLinear(base, factors.scale, weight)


def fold(W_OI: Tensor, factors: Factors) -> None:
    """W' in the place of W."""
    W_OI.addcmul_(W_OI, factors.delta_OI())
