"""A model's state in PEFT's names, as one has that was loaded from an adapter's folder, in ours.

sentence-transformers goes on with a checkpoint by loading it as a new model, and gives the state of that to ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool

BASE, HEAD, BEFORE = "base_layer.", "modules_to_save.", "original_module."


def translate(state: dict[str, Any], prefix: str, pool: Pool) -> bool:
    """Rename what PEFT calls otherwise, in place; s comes out of B, which has it in files.

    Args:
        state: tensors by name.
        prefix: of the model with the components, in these names.
        pool: the components.

    Returns:
        Whether the state was PEFT's.

    Raises:
        UsageError: it is of a kind of adapter whose numbers cannot be told from it.
    """
    kinds = {key.split(".")[-3] for key in state if key.startswith(prefix) and key.endswith(".default.weight")}
    if not kinds & {"lora_A", "hira_A"} and not any("vera_lambda" in key for key in state):
        return False
    if "lora_A" not in kinds:
        raise UsageError(
            "the trainer reads its checkpoint back as an adapter of PEFT, from which this variant cannot go on",
            "use variant lora or dora with this trainer",
        )
    below = _by_layer(state, prefix, pool)
    for name, layer in pool.layers.items():
        _layer(state, f"{prefix}{name}.", below[name], layer)
    for key in [key for key in state if key.startswith(prefix) and BEFORE in key]:
        del state[key]
    for key in [key for key in state if key.startswith(prefix) and HEAD in key]:
        state[key.replace(f"{HEAD}default.", "")] = state.pop(key)
    return True


def _by_layer(state: dict[str, Any], prefix: str, pool: Pool) -> dict[str, dict[str, Tensor]]:
    """What the state has below each layer, without the layer's name; taken out of it."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in pool.layers}
    for key in list(state):
        parts = key.removeprefix(prefix).split(".")
        name = next((".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in found), None)
        if key.startswith(prefix) and name is not None:
            found[name][".".join(parts[name.count(".") + 1 :])] = state.pop(key)
    return found


def _layer(state: dict[str, Any], at: str, below: dict[str, Tensor], layer: ComponentLinear) -> None:
    a_CI, b_OC = below.pop("lora_A.default.weight", None), below.pop("lora_B.default.weight", None)
    magnitude_O = below.pop("lora_magnitude_vector.default.weight", None)
    if a_CI is None or b_OC is None:  # a layer without components is in no file
        a_CI, b_OC = layer.a_CI.new_zeros(0, layer.a_width), layer.b_OC.new_zeros(layer.b_width, 0)
    state[f"{at}a_CI"], state[f"{at}b_OC"] = a_CI, b_OC / layer.scale
    for name, tensor in below.items():
        state[f"{at}base.{name.removeprefix(BASE)}"] = tensor
    for name, parameter in layer.named_parameters(recurse=False):
        if name not in ("a_CI", "b_OC"):
            state[at + name] = parameter.detach() if magnitude_O is None else magnitude_O
