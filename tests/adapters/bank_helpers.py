"""Adapters of any ranks on tiny models of any architecture, and what a mix of them is in fp64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numeric import in_double
from tiny_architectures import LANGUAGE, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.base import holds_weight
from dynlora_cli.models.linear import is_linear, is_transposed, linear_shape

WORDS = 260  # fewer than the tiny models know
# Roundings on the way to a logit: two blocks, in each seven products over up to 64 numbers, and as many components.
TERMS = 2 * 7 * (64 + 16)


def tiny_model(folder: Path, kind: str = "llama", task: str = LANGUAGE) -> Any:
    """A model of tests/tiny_architectures.py in memory, frozen."""
    path = folder / kind
    if not path.exists():
        write_model(path, kind)
    auto = AutoModelForCausalLM if task == LANGUAGE else AutoModelForSeq2SeqLM
    return auto.from_pretrained(path).eval().requires_grad_(False)


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that take components, without the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not holds_weight(module) and name != "lm_head"
    }


def an_adapter(model: nn.Module, seed: int, *, share: float = 0.6, most: int = 6, strength: float = 1.0) -> Adapter:
    """Some of the layers, each with a rank of its own; an update that matters."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in adaptable(model).items():
        if float(torch.rand((), generator=generator)) > share:
            continue
        (d_in, d_out), rank = linear_shape(module), 1 + int(torch.randint(most, (), generator=generator))
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        layers[name] = Factors(a, strength * torch.randn(d_out, rank, generator=generator) / rank**0.5)
    return Adapter(Path(f"adapter-{seed}"), layers, {})


def merged_in_double(model: Any, adapters: Mapping[str, Adapter], mix: Mapping[str, float]) -> Any:
    """The model in fp64 with the updates of a mix in its weights."""
    model = in_double(copy.deepcopy(model))
    for name, weight in mix.items():
        for layer, factors in adapters[name].layers.items():
            module = model.get_submodule(layer)
            delta = weight * (factors.b_OC.double() @ factors.a_CI.double())
            module.weight += delta.T if is_transposed(module) else delta
    return model


def texts(*lengths: int) -> list[Tensor]:
    """Token ids, each request another text."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, WORDS, (length,), generator=generator) for length in lengths]


def padded(requests: list[Tensor], model: Any) -> dict[str, Tensor]:
    """The batch with padding on the left, as for generation; an encoder's on the right."""
    longest, behind = max(map(len, requests)), model.config.is_encoder_decoder
    rows, masks = [], []
    for ids in requests:
        parts = [torch.zeros(longest - len(ids), dtype=torch.long), ids]
        rows.append(torch.cat(parts[::-1] if behind else parts))
        real = torch.tensor([0] * (longest - len(ids)) + [1] * len(ids))
        masks.append(real.flip(0) if behind else real)
    inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    if behind:
        inputs["decoder_input_ids"] = torch.arange(3, 3 + 2 * len(requests)).view(-1, 2)
    elif model.config.model_type != "opt":  # which counts the positions from the mask
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return inputs


def unpadded(inputs: dict[str, Tensor], row: int) -> tuple[dict[str, Tensor], Tensor]:
    """One request of a batch by itself, [1, T] each, and which of its places in the batch are tokens."""
    real = inputs["attention_mask"][row].bool()
    own = {key: value[row][real][None] for key, value in inputs.items() if key != "decoder_input_ids"}
    if "decoder_input_ids" in inputs:
        own["decoder_input_ids"] = inputs["decoder_input_ids"][row][None]
        return own, torch.ones(inputs["decoder_input_ids"].shape[1], dtype=torch.bool)
    return own, real
