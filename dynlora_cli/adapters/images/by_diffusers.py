"""What diffusers makes of an adapter's file: asked of its own loader, on a denoiser without weights.

Text encoders are models of transformers, which load adapters themselves: of those it is asked how diffusers names the
tensors that it hands to them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.images.kohya_names import LAYERS_PER_BLOCK
from dynlora_cli.adapters.images.names import CLIP_LEVEL, DENOISERS, PARTS
from dynlora_cli.models.patched import no_warnings
from dynlora_cli.models.quiet import quiet


@quiet
def loaded(file: Path, adapter: Adapter) -> dict[str, Factors] | None:
    """The layers of the denoiser as diffusers has them after it has loaded a file.

    Args:
        file: of an adapter.
        adapter: what should be in it; its layers' shapes make the denoiser.

    Returns:
        None: diffusers or PEFT is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("diffusers", "peft")):
        return None
    from diffusers.loaders import PeftAdapterMixin
    from diffusers.utils import logging

    class Denoiser(nn.Module, PeftAdapterMixin):
        """Modules with the layers' names, and nothing that computes."""

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        found: dict[str, Factors] = {}
        for part in DENOISERS:
            layers = {
                name.removeprefix(f"{part}."): f for name, f in adapter.layers.items() if name.startswith(f"{part}.")
            }
            if not layers:
                continue
            model = Denoiser()
            for name, factors in layers.items():
                _place(model, name, factors)
            with no_warnings:
                tensors, alphas, metadata = _read(file)
                model.load_lora_adapter(
                    tensors, prefix=part, network_alphas=alphas, metadata=metadata, low_cpu_mem_usage=True
                )
            modules: dict[str, Any] = dict(model.named_modules())
            found |= {f"{part}.{name}": _factors(modules[name], factors) for name, factors in layers.items()}
        return found
    finally:
        logging.set_verbosity(level)


@quiet
def lost_in_encoders(file: Path, adapter: Adapter) -> list[str]:
    """Layers of text encoders to which diffusers gives nothing, though the file has them.

    Args:
        file: that `loaded` has read.
        adapter: what should be in it.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    tensors, _, _ = _read(file)
    lost = []
    for part in [part for part in PARTS if part not in DENOISERS]:
        own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        try:
            there = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        except ValueError:  # of no form that it knows
            there = {}
        keys = {key.removeprefix(CLIP_LEVEL) for key in there}
        layers = [name for name in adapter.layers if name.startswith(f"{part}.")]
        inner = {name: name.removeprefix(f"{part}.").removeprefix(CLIP_LEVEL) for name in layers}
        lost += [name for name in layers if f"{inner[name]}.lora_A.weight" not in keys]
    return lost


def _read(file: Path) -> tuple[dict[str, Any], Any, Any]:
    """The tensors of a file as diffusers names them, its alphas, and its metadata."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    config = SimpleNamespace(layers_per_block=LAYERS_PER_BLOCK)
    found: tuple[dict[str, Any], Any, Any] = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(file), weight_name=file.name, unet_config=config, return_lora_metadata=True
    )
    return found


def _place(model: nn.Module, name: str, factors: Factors) -> None:
    """Put a layer without weights where its name says."""
    *path, leaf = name.split(".")
    for level in path:
        if level not in model._modules:
            model.add_module(level, nn.Module())
        model = model.get_submodule(level)
    d_in, d_out = factors.a_CI.shape[1], factors.b_OC.shape[0]
    made: nn.Module
    if factors.kernel:
        height, width = factors.kernel
        made = nn.Conv2d(d_in // (height * width), d_out, (height, width), bias=False, device="meta")
    else:
        made = nn.Linear(d_in, d_out, bias=False, device="meta")
    # One zero, seen everywhere: components are put on the device where the weight is.
    made.weight = nn.Parameter(torch.zeros(1).expand(made.weight.shape), requires_grad=False)
    model.add_module(leaf, made)


def _factors(module: Any, ours: Factors) -> Factors:
    """What diffusers put around a layer."""
    name = next(iter(module.scaling))
    a, b = module.lora_A[name].weight.detach().float(), module.lora_B[name].weight.detach().float()
    scale = float(module.scaling[name])
    return Factors(a.reshape(len(a), -1), scale * b.reshape(len(b), -1), scale, kernel=ours.kernel)
