"""VeRA: numbers that scale random components, which all layers share. Its files are read as the LoRA that it equals.

    W' = W + diag(b) B diag(d) A          A and B are the same for all layers, cut to their shapes

The factors are diag(d) A and diag(b) B, without the components at d = 0.

Dimensions: C components of a layer, I inputs, O outputs, R components of VeRA's pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dynlora_cli.adapters.adapter import PREFIX, Adapter, Factors
from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.adapters.kind import COPY_AGAIN, ONLY_LORA, Files, Parts, refuse_zeros
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.vera import D_INITIAL, VeraLinear
from dynlora_cli.models.find import find_model
from dynlora_cli.models.weights import Weights

title = "VeRA"
read_as = "VeRA, as the LoRA that it equals"
tensors = ("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d")
SHARED = "base_model"  # where VeRA's pair stands among the layers


def read(adapter: Adapter, parts: Parts, base: str | None) -> dict[str, Factors]:
    """The LoRA that a VeRA equals.

    Raises:
        UsageError: A and B are not in the file, a layer is incomplete, or the base is another one.
        MachineError: the base's files are needed, and not on this machine.
    """
    pair = parts.get(SHARED, {})
    if pair.keys() != {"vera_A", "vera_B"}:
        raise UsageError(
            f"{adapter.folder / WEIGHTS} holds no vera_A and vera_B, which all layers share",
            "save it with PEFT and `save_projection=True`",
        )
    own = {module: tensors for module, tensors in parts.items() if module != SHARED}
    for module, tensors in own.items():
        if tensors.keys() != {"vera_lambda_b", "vera_lambda_d"}:
            raise UsageError(f"{adapter.folder}: layer {module} lacks its vera_lambda_b or vera_lambda_d", COPY_AGAIN)
    inputs = _inputs(adapter, {module: len(tensors["vera_lambda_b"]) for module, tensors in own.items()}, base)
    layers = {}
    for module, tensors in own.items():
        b_O, d_R = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        a_RI, b_OR = pair["vera_A"][:, : inputs[module]], pair["vera_B"][: len(b_O)]
        if not (a_RI.shape == (len(d_R), inputs[module]) and b_OR.shape == (len(b_O), len(d_R))):
            raise UsageError(
                f"{adapter.folder}: layer {module} does not fit vera_A {tuple(pair['vera_A'].shape)} and vera_B "
                f"{tuple(pair['vera_B'].shape)}",
                "the files, or the base, are of another adapter",
            )
        alive_R = d_R != 0
        layers[module] = Factors((d_R[:, None] * a_RI)[alive_R], b_O[:, None] * b_OR[:, alive_R])
    return refuse_zeros(layers, adapter)


def _inputs(adapter: Adapter, outputs: Mapping[str, int], base: str | None) -> dict[str, int]:
    """d_in of every layer, which VeRA's tensors do not say: from the run's record, else from the base's files."""
    recorded = adapter.record.get("layers") or {}
    if outputs.keys() <= recorded.keys():
        return {module: recorded[module]["d_in"] for module in outputs}
    name = base or adapter.base_name
    if not name:
        raise UsageError(
            f"{adapter.folder / CONFIG} does not say what the base model is, and a VeRA's shapes are the base's",
            "write its folder or hub id there as base_model_name_or_path",
        )
    revision = None if base else adapter.config.get("revision")
    weights = Weights(find_model(Model(name_or_path=name, revision=revision))[0])
    inputs = {}
    for module, d_out in outputs.items():
        tensor = weights.locate(module)
        shape = weights.entries[tensor].shape if tensor else ()
        d_in, found = (shape if adapter.fan_in_fan_out else shape[::-1]) if len(shape) == 2 else (0, 0)
        if found != d_out:
            raise UsageError(
                f"{adapter.folder}: {module} has {d_out} outputs, and its tensor in {weights.folder} the shape {shape}",
                "this is another base model, or one that is stored quantized; name the right one with --base FOLDER",
            )
        inputs[module] = d_in
    return inputs


def saved(pool: Pool, config: dict[str, Any]) -> Files:
    """PEFT's own form; layers without an entry are not listed, and A and B are as wide as those that are."""
    layers = {name: layer for name, layer in pool.layers.items() if layer.count and isinstance(layer, VeraLinear)}
    first = next(iter(layers.values()))
    tensors = {
        "base_model.vera_A": first.pair[0][:, : max(layer.in_features for layer in layers.values())],
        "base_model.vera_B": first.pair[1][: max(layer.out_features for layer in layers.values())],
    }
    rank = len(first.pair[0])
    for name, layer in layers.items():
        d_R = torch.zeros(rank)
        d_R[layer.survivors_C] = layer.a_CI.detach().cpu().flatten()
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = d_R
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = layer.lambda_b_O.detach()
    written = {key: value for key, value in config.items() if key not in ONLY_LORA} | {
        "peft_type": "VERA",
        "bias": "none",
        "r": rank,
        "d_initial": D_INITIAL,
        "init_weights": True,
        "projection_prng_key": first.seed,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    return written, tensors
