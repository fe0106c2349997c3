"""What PEFT makes of an adapter folder, asked of PEFT itself on a model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.expert_files import parameter_of, parts_of
from dynlora_cli.adapters.kind import tensor_names
from dynlora_cli.errors import DynloraError
from dynlora_cli.models.experts import PARAMETERS
from dynlora_cli.models.patched import no_warnings


def scales_of(folder: Path, adapter: Adapter) -> dict[str, float]:
    """The scale that PEFT applies to every module, after it has loaded the folder's files.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        adapter: what should be in it; its layers' shapes make the model that PEFT is given.

    Raises:
        DynloraError: PEFT finds tensors missing or too many.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    model = nn.Module()
    # PEFT wraps the parameters of experts in the order in which their module registers them.
    for name in sorted(adapter.layers, key=lambda name: name.split(".")[-1] == PARAMETERS[-1]):
        _place(model, name, adapter.layers[name])
    with no_warnings:
        config = PeftConfig.from_pretrained(str(folder))
        config.modules_to_save = config.trainable_token_indices = None  # heads and rows have no scale
        config.bias = "none"
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        known = {k: v for k, v in load_peft_weights(str(folder), device="cpu").items() if _of_factors(k)}
        found: Any = set_peft_model_state_dict(
            model, {k.removeprefix("base_model.model."): v for k, v in known.items()}, low_cpu_mem_usage=True
        )
    missing = [key for key in found.missing_keys if _of_factors(key)]
    if missing or found.unexpected_keys:
        raise DynloraError(
            f"PEFT misses {missing[:3]} and does not expect {found.unexpected_keys[:3]}", "please report this"
        )
    modules: dict[str, Any] = dict(model.named_modules())
    return {
        name: 1.0 if adapter.multiplies else _wrapper(modules, name, factors).scaling["default"]
        for name, factors in adapter.layers.items()
    }


def _wrapper(modules: dict[str, Any], name: str, factors: Factors) -> Any:
    """The module that PEFT has put around a layer, or around the parameter of experts that it is a slice of."""
    if not factors.experts:
        return modules[name]
    module, _, parameter = parts_of(name)
    wrapper = modules[module]
    while wrapper.parameter_name != parameter:
        wrapper = wrapper.base_layer
    return wrapper


def _of_factors(key: str) -> bool:
    return any(name in key for name in tensor_names())


def _place(model: nn.Module, name: str, factors: Factors) -> None:
    d_in, d_out = factors.a_CI.shape[1], factors.b_OC.shape[0]
    *path, leaf = (parameter_of(name) if factors.experts else name).split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    if factors.experts:
        model.register_parameter(leaf, nn.Parameter(torch.empty(factors.experts, d_out, d_in, device="meta")))
        return
    made = nn.Embedding(d_out, d_in, device="meta") if factors.embedding else nn.Linear(d_in, d_out, device="meta")
    model.add_module(leaf, made)
