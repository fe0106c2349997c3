"""Biases for layers whose base has none, as PEFT's `lora_bias` adds them.

A merged model can hold them where its class makes such biases by a switch of config.json, such as Llama's
`attention_bias`. The switch gives biases to other layers, too; those are zeros.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.replaced import replacements
from dynlora_cli.errors import UsageError
from dynlora_cli.models.load import load_structure
from dynlora_cli.models.place import Place, structure

BESIDE = "use the adapter beside the base"


def with_biases(place: Place, adapter: Adapter) -> tuple[PreTrainedModel, dict[str, bool]]:
    """The base's structure with a bias wherever the adapter adds one, and the switches of its config for that.

    Raises:
        UsageError: the model's class has no switch for one of them; or the adapter does not fit.
    """
    model = structure(place)
    wanted = {name for name, found in replacements(model, adapter).items() if found.new}
    if not wanted:
        return model, {}
    config: Any = model.config.get_text_config()
    off = [key for key, value in config.to_dict().items() if "bias" in key and value is False]
    used: dict[str, bool] = {}
    for key in off:
        if wanted & _biases(_with(place, {key: True})):
            used[key] = True
    grown = _with(place, used)
    if absent := sorted(wanted - _biases(grown)):
        raise UsageError(
            f"{adapter.folder} adds a bias to {absent[0].removesuffix('.bias')}, which has none in {place.folder}, and "
            f"no switch of a {type(model).__name__} gives it one",
            BESIDE,
        )
    return grown, used


def _with(place: Place, switches: dict[str, bool]) -> PreTrainedModel:
    return load_structure(place.options, place.folder, place.labels, changes=switches)


def _biases(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(".bias")}
