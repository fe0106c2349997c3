"""Writes the LoRA file of a diffusion pipeline, in diffusers' form or kohya's: one .safetensors.

Every reader finds the same scale. Of diffusers' form it is 1: alpha is the rank where the file has none, and the
metadata says both for each layer. Of kohya's it is alpha / rank with one alpha for all layers; see `ImageFile.alphas`.

Dimensions: C components of a layer, I inputs (x height x width of a kernel), O outputs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images import kohya_names
from dynlora_cli.adapters.images.names import DENOISERS, PARTS
from dynlora_cli.adapters.images.read import METADATA
from dynlora_cli.config.dtypes import IN_FILES, OF_IMAGES
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.tensor_file import file_bytes, in_order
from dynlora_cli.lora.timesteps.schedule import KEY
from dynlora_cli.rounding.floats import TORCH

# What a file's header says of its bytes or its rank, which are others now.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", METADATA, KEY)
_RANKS = ("ss_network_dim", "ss_network_alpha")
NEAR = 2.0**-22  # B is kept without the scale s, and (b / s) · s may miss b by the last bit of fp32
# What diffusers calls the factors of a layer. Of a text encoder it takes the first by an attention layer's name alone.
_PLAIN, _LINEAR = ("lora_A", "lora_B"), ("lora_linear_layer.down", "lora_linear_layer.up")
LONGEST_STEM = 120  # characters of a file's name
LARGEST_METADATA = 1 << 22  # characters; tag counts of a large data set have a tenth of it


def save(adapter: Adapter, folder: Path, dtype: str) -> Path:
    """Write the adapter in its form; the bytes depend on the adapter only.

    Args:
        adapter: of a pipeline, whose factors have only values that the format has.
        folder: exists.
        dtype: of its factors, of config/dtypes.py.

    Returns:
        The file.

    Raises:
        UsageError: the format, or a layer, is none of such a file.
        MeasureError: a number is not finite, or does not come back from the format.
    """
    stored = {}
    for name, tensor in tensors_of(adapter, dtype).items():
        number = TORCH[dtype] if tensor.ndim else torch.float32
        stored[name] = tensor.to(number).contiguous()
        if not tensor.isfinite().all():
            raise MeasureError(
                f"{name} holds NaN or infinity; nothing was written", "look at the adapters that went in"
            )
        if not torch.allclose(stored[name].float(), tensor, rtol=NEAR, atol=0):
            raise MeasureError(f"{name} does not come back from {dtype} as it went in", "please report this")
    path = folder / file_name(adapter)
    path.write_bytes(in_order(to_bytes(stored, metadata=metadata_of(adapter))))
    return path


def bytes_of(adapter: Adapter, dtype: str) -> int:
    """Bytes of the file that `save` writes."""
    shapes = {
        name: (IN_FILES[dtype] if tensor.ndim else "F32", tuple(tensor.shape))
        for name, tensor in tensors_of(adapter, dtype).items()
    }
    return file_bytes(shapes, metadata_of(adapter))


def file_name(adapter: Adapter) -> str:
    """The name of the adapter's file: diffusers looks for one; of kohya's it is the adapter's."""
    assert adapter.image is not None
    if adapter.image.form == "diffusers":
        return f"{IMAGE_STEM}.safetensors"
    stem = re.sub(r"[^A-Za-z0-9._ ()+-]", "_", adapter.image.stem)[:LONGEST_STEM].lstrip(".")
    return f"{stem or 'lora'}.safetensors"


def tensors_of(adapter: Adapter, dtype: str) -> dict[str, Tensor]:
    """The tensors by their names in the file.

    Raises:
        UsageError: the format is none that diffusers and kohya's scripts read, or a layer has no name in the form.
    """
    assert adapter.image is not None
    if dtype not in OF_IMAGES:
        raise UsageError(f"{adapter.folder} is a file of {adapter.file_form}'s form, which has no {dtype}", "use bf16")
    alphas = adapter.image.alphas(adapter.ranks)
    without_attention = _encoders_without_attention(adapter)
    tensors: dict[str, Tensor] = {}
    for layer, factors in adapter.layers.items():
        down, up = _shaped(factors, alphas[layer])
        if adapter.image.form == "diffusers":
            down_key, up_key = _LINEAR if layer.partition(".")[0] in without_attention else _PLAIN
            tensors |= {f"{layer}.{down_key}.weight": down, f"{layer}.{up_key}.weight": up}
            continue
        name = kohya_names.name_of(layer, adapter.image.style)
        if kohya_names.layer_of(name) != layer:
            raise UsageError(
                f"{adapter.folder} adapts {layer}, which kohya's files have no name for",
                "they are of the UNet and the CLIP encoders of SD 1, 2 and XL; use --to diffusers",
            )
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(alphas[layer]))
    return dict(sorted(tensors.items()))


def _encoders_without_attention(adapter: Adapter) -> set[str]:
    """Text encoders of which the adapter has no attention layer, as a small budget may leave it."""
    with_attention = {name.partition(".")[0] for name in adapter.layers if ".self_attn." in name}
    return {name.partition(".")[0] for name in adapter.layers} - with_attention - set(DENOISERS)


def _shaped(factors: Factors, alpha: int) -> tuple[Tensor, Tensor]:
    """The factors as a layer has them, of a convolution two of them, with B before alpha / rank multiplies it."""
    b_OC = factors.b_OC / (alpha / factors.rank)
    if not factors.kernel:
        return factors.a_CI, b_OC
    return factors.a_CI.reshape(factors.rank, -1, *factors.kernel), b_OC[:, :, None, None]


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """The texts in the file's header: those of the file that was read, and what they say of ranks as it is now."""
    assert adapter.image is not None
    kept = {key: text for key, text in adapter.image.metadata.items() if key not in _STALE}
    if sum(len(key) + len(text) for key, text in kept.items()) > LARGEST_METADATA:
        kept = {}
    if adapter.schedule:
        kept |= adapter.schedule.as_metadata()
    if adapter.image.form == "kohya":
        ranks = set(adapter.ranks.values())
        one = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # the word of kohya's own script that resizes
        return {**kept, "format": "pt", **{key: one for key in _RANKS if key in kept}}
    said = {f"{part}.{key}": value for part in PARTS for key, value in _config(adapter, part).items()}
    return {**kept, "format": "pt", METADATA: json.dumps(said, sort_keys=True)}


def _config(adapter: Adapter, part: str) -> dict[str, object]:
    """What PEFT's LoraConfig of a part is, as far as it is not the default.

    A CLIP encoder's level `text_model` is left out of names: diffusers takes it off the tensors' names where the
    encoder has none, and PEFT looks at the ends of names.
    """
    begins = (f"{part}.text_model.", f"{part}.")
    ranks = {
        next(name.removeprefix(begin) for begin in begins if name.startswith(begin)): factors.rank
        for name, factors in adapter.layers.items()
        if name.startswith(f"{part}.")
    }
    if not ranks:
        return {}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    ends = {name[at + 1 :] for name in ranks for at, letter in enumerate(name) if letter == "."}
    # A name that is the end of another layer's would be that one's rank as well.
    pattern = {f"^{name}" if name in ends else name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "alpha_pattern": pattern,
        "lora_alpha": usual,
        "r": usual,
        "rank_pattern": pattern,
        "target_modules": list(ranks),
    }
