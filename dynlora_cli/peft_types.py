"""What PEFT does with a layer because of the type of its model: layers that it takes for experts, or does not take.

transformers 5 holds all experts of a block in one parameter, where version 4 had a module for each. For the types of
model that changed so, PEFT reads `target_modules` as if version 4 had written them: whatever ends in gate_proj,
up_proj or down_proj becomes a target among the experts, dense layers and shared experts lose their components with a
warning, and one of a fused pair without the other is an error. `target_parameters` are taken as they are. A linear
layer's weight as such a target gives the same update, under the same names of tensors.

Source: peft 0.21, utils/transformers_weight_conversion.py and tuners/tuners_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection

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


def refused_by_peft(model_type: str) -> frozenset[str]:
    """Ends of the names of linear layers that PEFT does not adapt in a model of this type."""
    return frozenset({"out_proj"}) if model_type in MAMBA else frozenset()


def ends_in(names: Collection[str], ends: Collection[str]) -> set[str]:
    """Those of the names whose last part is one of these."""
    return {name for name in names if name.rpartition(".")[2] in ends}
