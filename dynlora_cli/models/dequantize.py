"""A base that is stored quantized, as the full model that training saw."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from dynlora_cli.errors import UsageError
from dynlora_cli.files.whole import write_json
from dynlora_cli.models.linear import dense_weight, is_plain, kind_of
from dynlora_cli.models.load import DTYPES, MXFP4, Base, load_structure
from dynlora_cli.models.place import Place

BESIDE = ("*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "*token*.json", "vocab.json", "generation_config.json")


def quantized_layers(base: Base) -> list[str]:
    """All layers whose weights are quantized in memory, by bitsandbytes or by a method that is not known here."""
    return [name for name, module in base.model.named_modules() if _is_ours(module) or _made_by_others(module)]


def write_dequantized(base: Base, place: Place, folder: Path, dtype: torch.dtype | None) -> Place:
    """Write the model with its weights in full, in the layout of published files.

    Args:
        base: in memory, as training saw it.
        place: where it is stored.
        folder: an empty one.
        dtype: of the new weights; None: what the config says.

    Returns:
        the new model's place.

    Raises:
        UsageError: it is quantized by a method that is not known here.
    """
    method, layers = place.files.quantization, quantized_layers(base)
    known = method in ("bitsandbytes", MXFP4)  # the latter is loaded as plain numbers
    if not known or not all(_is_ours(base.model.get_submodule(name)) for name in layers):
        raise UsageError(
            f"{place.folder} is stored quantized by {method}, which is not turned back here",
            "name the model it was made from: --base FOLDER",
        )
    full = load_structure(place.options, place.folder, place.labels)
    number = dtype or DTYPES.get(str(base.model.config.dtype).removeprefix("torch."), torch.float32)
    state = {name: tensor for name, tensor in base.model.state_dict().items() if name in full.state_dict()}
    state |= {f"{name}.weight": dense_weight(base.model.get_submodule(name)) for name in layers}
    state = {name: t.cpu().to(number) if t.is_floating_point() else t.cpu() for name, t in state.items()}
    full.load_state_dict(state, assign=True, strict=True)
    full.tie_weights()
    if hasattr(full.config, "quantization_config"):
        del full.config.quantization_config
    full.save_pretrained(folder)
    config = full.config.to_dict()
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config | {"dtype": str(number).removeprefix("torch.")})
    for pattern in BESIDE:
        for path in place.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    options = place.options.model_copy(update={"name_or_path": str(folder)})
    return Place(options, folder, place.labels, True)


def _is_ours(module: nn.Module) -> bool:
    """Whether `dense_weight` knows how the weight is quantized."""
    return getattr(kind_of(module), "quantized", False)


def _made_by_others(module: nn.Module) -> bool:
    """Whether a module is made from `nn.Linear` in a way that no file of models/linears/ knows."""
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear and is_plain(module)
