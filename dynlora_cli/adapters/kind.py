"""What a kind of adapter is: a file in adapters/kinds/ with these names. Its name is PEFT's `peft_type`.

title = "DoRA"
    Its name for people.

tensors = ("lora_A", ...)
    What PEFT calls the tensors of a layer in adapter_model.safetensors.

read(adapter, parts, base) -> {layer: Factors}
    The layers of files whose `peft_type` is the file's name. A kind that PEFT keeps in another kind's files, as DoRA in
    LoRA's, has none.

written(config, tensors, own) -> (config, tensors)
    The files, from those of a plain LoRA and from what the layers have beside their factors.

layer(base, factors, weight, bias) -> ComponentLinear
    The layer that computes with these factors, on the frozen layer `base`; `weight()` and `bias()` read W and its bias.

fold(W_OI, factors)
    Turns W into W', in place.

own_of(layer) -> {name: tensor}
    Optional: what a layer has beside its factors, as `Factors.own`.

saved(pool, config) -> (config, tensors)
    Optional: the files of a run's layers, where they are not `written` from their factors; names as in the file.

multiplies = True
    Optional: ΔW is no update that is added to W; what flows through it cannot be told from the factors.

keeps_one = True
    Optional: a layer without components cannot be stored.

across_inputs = True
    Optional: `fold` needs all inputs of an output at once.

read_as = "VeRA, as the LoRA that it equals"
    Optional: what people are told, where `read` makes another kind of it.

Dimensions: C components of a layer, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PREFIX, Adapter, Factors
from dynlora_cli.adapters.expert_files import fuse
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.experts import ExpertSlice

Parts = Mapping[str, Mapping[str, Tensor]]  # the tensors of every layer
Own = Mapping[str, Mapping[str, Tensor]]  # what every layer has beside its factors
Files = tuple[dict[str, Any], dict[str, Tensor]]  # adapter_config.json, and the tensors by their names in the base

Read = Callable[[], Any]  # a tensor, or None where the layer has none

COPY_AGAIN = "copy the files again"
# Keys of `lora_config` that PEFT's other configurations do not have.
ONLY_LORA = (
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora",
    "use_rslora",
)  # fmt: skip


def of(factors: Factors) -> ModuleType:
    """The kind of a layer."""
    return plugins.load("kinds", factors.kind)


def tensor_names() -> list[str]:
    """What the tensors of a layer are called, in the files of all kinds."""
    return sorted({name for kind in plugins.names("kinds") for name in plugins.declared("kinds", kind, "tensors")})


def saved(kind: str, pool: Pool, config: dict[str, Any]) -> Files:
    """The files of a run's layers in the form of a kind.

    Args:
        kind: a file of adapters/kinds/.
        pool: the layers.
        config: adapter_config.json of a plain LoRA.

    Returns:
        adapter_config.json, and the tensors by their names in adapter_model.safetensors.
    """
    form = plugins.load("kinds", kind)
    if hasattr(form, "saved"):
        return form.saved(pool, config)
    own = {name: own_of(kind, layer) for name, layer in pool.layers.items() if layer.count}
    config, tensors = form.written(config, lora_tensors(pool), own)
    return config, {PREFIX + name: tensor for name, tensor in tensors.items()}


def own_of(kind: str, layer: ComponentLinear) -> dict[str, Tensor]:
    """What a layer has beside its factors, see `Factors.own`."""
    form = plugins.load("kinds", kind)
    return form.own_of(layer) if hasattr(form, "own_of") else {}


def lora_tensors(pool: Pool) -> dict[str, Tensor]:
    """By their names in the base: lora_A.weight [C, I], lora_B.weight [O, C] with s in it; layers at rank 0 absent."""
    experts = experts_of(pool)
    tensors: dict[str, Tensor] = {}
    slices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in pool.layers.items():
        if layer.count:
            a_CI, b_OC = layer.factors()
            a_CI, b_OC = a_CI.detach(), layer.scale * b_OC.detach()
            if name in experts:
                slices[name] = a_CI, b_OC
            else:
                tensors |= {f"{name}.lora_A.weight": a_CI, f"{name}.lora_B.weight": b_OC}
    return tensors | fuse(slices, experts)


def experts_of(pool: Pool) -> dict[str, int]:
    """Layers that are the slice of one expert, and how many experts their parameter holds."""
    return {name: layer.base.experts for name, layer in pool.layers.items() if isinstance(layer.base, ExpertSlice)}


def refuse_zeros(layers: dict[str, Factors], adapter: Adapter) -> dict[str, Factors]:
    """The layers, where one of them has a component.

    Raises:
        UsageError: none has.
    """
    if not any(factors.rank for factors in layers.values()):
        raise UsageError(f"{adapter.folder / WEIGHTS} holds zeros only", "train it first")
    return layers
