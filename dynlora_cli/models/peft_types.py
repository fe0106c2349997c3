"""What PEFT does with a layer because of the type of its model: layers that it takes for experts, or does not take.

transformers 5 holds all experts of a block in one parameter, where version 4 had a module for each. For the types of
model that changed so, PEFT reads `target_modules` as if version 4 had written them: whatever ends in gate_proj,
up_proj or down_proj becomes a target among the experts, dense layers and shared experts lose their components with a
warning, and one of a fused pair without the other is an error. `target_parameters` are taken as they are. A linear
layer's weight as such a target gives the same update, under the same names of tensors.

Source: peft 0.21, utils/transformers_weight_conversion.py and tuners/tuners_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# By the type of model whose conversion transformers applies, the ends of names that PEFT takes for experts.
OF_EXPERTS = {
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
}
# Types whose fused kernels read the weight of out_proj past its module; PEFT refuses it.
MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def taken_for_experts(model_type: str) -> frozenset[str]:
    """Ends of the names of modules that PEFT does not leave alone in `target_modules` of a model of this type."""
    from transformers import conversion_mapping

    # The table has no public name; where a version of transformers has none, PEFT converts nothing.
    converted_as = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    return OF_EXPERTS.get(converted_as or "", frozenset())


def not_adapted(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why PEFT does not adapt some of a model's linear layers, by name."""
    model_type = model.config.model_type
    reasons = dict.fromkeys(
        _renamed(model, linear),
        f"PEFT stores no such layer of a model of type {model_type}: "
        "it takes the name for one in a file, and makes another name of it",
    )
    for name, module in linear.items():
        if name.rpartition(".")[2] == "out_proj" and model_type in MAMBA:
            reasons[name] = (
                f"PEFT adapts no out_proj in a model of type {model_type}, since the fused kernels of such models read "
                "its weight past any adapter"
            )
        if type(module).__name__.endswith("GroupedLinear"):
            reasons[name] = "it multiplies groups of its inputs by parts of its weight, which is no product with it"
    return reasons


def _renamed(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Layers whose names PEFT changes when it reads their factors, by what transformers does to files of this type."""
    try:
        from transformers import conversion_mapping as tables
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if tables.get_checkpoint_conversion_mapping(model.config.model_type) is None:
            return []
        entries = tables.get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # an earlier transformers, with which PEFT changes nothing
        return []
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    keys = {name: f"{name}.lora_A.weight" for name in names}
    return [name for name, key in keys.items() if rename_source_key(key, renamings, converters)[0] != key]


def ends_in(names: Collection[str], ends: Collection[str]) -> set[str]:
    """Those of the names whose last part is one of these."""
    return {name for name in names if name.rpartition(".")[2] in ends}
