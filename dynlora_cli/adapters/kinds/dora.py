"""DoRA: components turn a weight, and a magnitude for each output says how long it is.

    W' = m · (W + ΔW) / ‖W + ΔW‖          norms over the inputs of each output; in a table over its tokens

PEFT keeps it in the files of a LoRA (`use_dora`), with m as `lora_magnitude_vector`.

Source: Liu et al. 2024, DoRA (arXiv 2402.09353), equation 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.adapters.kind import Files, Own, Read
from dynlora_cli.lora.dora import DoraLinear
from dynlora_cli.lora.layer import ComponentLinear

title = "DoRA"
tensors = ("lora_magnitude_vector",)
keeps_one = True
across_inputs = True


def written(config: dict[str, Any], tensors: dict[str, Tensor], own: Own) -> Files:
    """A LoRA's files with a magnitude vector for each layer."""
    magnitudes = {f"{name}.lora_magnitude_vector": next(iter(more.values())) for name, more in own.items() if more}
    return {**config, "use_dora": True}, {**tensors, **magnitudes}


def own_of(layer: ComponentLinear) -> dict[str, Tensor]:
    """m of a layer."""
    return {"magnitude_O": layer.magnitude_O.detach()} if isinstance(layer, DoraLinear) else {}


def layer(base: nn.Module, factors: Factors, weight: Read, bias: Read) -> DoraLinear:
    """The layer that computes with W', without having it in memory."""
    return DoraLinear(base, factors.scale, factors.own["magnitude_O"], weight, bias())


def fold(W_OI: Tensor, factors: Factors) -> None:
    """W' in the place of W."""
    W_OI.addmm_(factors.b_OC, factors.a_CI)
    if factors.embedding:
        W_OI.mul_(factors.own["magnitude_I"] / W_OI.norm(dim=0))
        return
    W_OI.mul_((factors.own["magnitude_O"] / W_OI.norm(dim=1)).unsqueeze(1))
