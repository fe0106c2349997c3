"""Reads the LoRA file of a diffusion pipeline, in diffusers' form or kohya's, with its convolutions.

Scales are folded into B, as of every adapter: alpha / rank, where alpha is a tensor of its own (kohya), or in the
file's metadata (diffusers, `lora_adapter_metadata`), and the rank where nobody says it. Nothing is skipped.

Dimensions: C components of a layer, I inputs (x height x width of a kernel), O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors, ImageFile
from dynlora_cli.adapters.births import born_of
from dynlora_cli.adapters.images import kohya_names
from dynlora_cli.adapters.images.by_timestep import with_schedule
from dynlora_cli.adapters.images.names import ALPHA, DOWN, PARTS, UP, is_other, looks_like_image, named, refusal
from dynlora_cli.adapters.numbers import check_numbers
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, LARGEST_ALPHA, PeftForm, fits, shown
from dynlora_cli.files.patterns import PatternMap
from dynlora_cli.files.peft_fields import CHANGED_BASE, REFUSED
from dynlora_cli.files.strict_json import BadJsonError, loads
from dynlora_cli.files.tensor_file import header_of
from dynlora_cli.runs.folder import RECORD, read_record
from dynlora_cli.text import natural_order

METADATA = "lora_adapter_metadata"  # in which diffusers keeps what PEFT has in adapter_config.json
FORMATS = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PEFT_DEFAULT = 8  # r and lora_alpha of a LoraConfig that does not say
MOST_TENSORS = 100_000


@dataclass
class _Layer:
    """The keys of a layer's tensors, by what they are, and its name in a file of kohya's."""

    keys: dict[str, str] = field(default_factory=dict)
    name: str = ""


def read_image(file: Path, note: str | None = None) -> Adapter:
    """Read the adapter in a file.

    Args:
        file: .safetensors.
        note: how it was found.

    Raises:
        UsageError: the file is damaged, or holds something that is not understood, or that is no LoRA.
        MeasureError: its numbers are not finite.
    """
    header = header_of(file)
    metadata = header.pop("__metadata__", None) or {}
    layers, form = _sorted(list(header), file)
    style = _style(layers, file)
    tensors = _tensors(file, layers)
    types = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    dtype = FORMATS.get(next(iter(types)), FULL) if len(types) == 1 else FULL
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    scales = _Scales(layers, tensors, metadata if form == "diffusers" else {}, file)
    found = {name: _factors(name, layer, tensors, scales, file) for name, layer in layers.items()}
    notes = [note]
    if dtype == FULL and types != {torch.float32}:
        said = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        notes.append(f"{file} holds factors in {said}; all are taken as {FULL}")
    image = ImageFile(form, file.stem, dtype, metadata, style)
    record = _record_of(file)
    born, fault = born_of({name: factors.rank for name, factors in found.items()}, file.parent, record)
    found = {name: replace(factors, born=born[name]) for name, factors in found.items()}
    told = "; ".join(filter(None, [*notes, fault])) or None
    adapter = Adapter(file, found, {"peft_type": "LORA"}, record, note=told, image=image)
    return with_schedule(adapter, metadata, file)


def _sorted(keys: list[str], file: Path) -> tuple[dict[str, _Layer], str]:
    """The layers of a file, in the pipeline's order, and its form.

    Raises:
        UsageError: a key is not understood, is there twice under two names, or there are none.
    """
    if not keys:
        raise UsageError(f"{file} holds no tensors", COPY_AGAIN)
    if other := next((key for key in keys if is_other(key)), None):
        raise refusal(other, file, len(keys))
    if not looks_like_image(keys) and not any("lora" in key for key in keys):
        raise UsageError(
            f"{file} holds {len(keys)} tensors, such as {shown(keys[0])}, and no LoRA: it seems to be a whole model",
            "name the file of a LoRA; `dynlora merge` takes models as --base",
        )
    if len(keys) > MOST_TENSORS:
        raise UsageError(f"{file} holds {len(keys):,} tensors, more than any LoRA", "is it one?")
    of_kohya = kohya_names.is_kohya(keys)
    layers: dict[str, _Layer] = {}
    for key in keys:
        found = kohya_names.named(key) if of_kohya else (*(named(key) or ("", "")), "")
        if found is None or not found[0]:
            raise refusal(key, file, len(keys))
        name, leaf, in_file = found
        layer = layers.setdefault(name, _Layer(name=in_file))
        if leaf in layer.keys or layer.name != in_file:
            other = layer.keys.get(leaf) or next(iter(layer.keys.values()))
            raise UsageError(f"{file} holds {other} and {key}, which are of one layer", "leave one of them out")
        layer.keys[leaf] = key
    order = sorted(layers, key=lambda name: (PARTS.index(name.partition(".")[0]), natural_order(name)))
    return {name: layers[name] for name in order}, "kohya" if of_kohya else "diffusers"


def _style(layers: Mapping[str, _Layer], file: Path) -> kohya_names.Style:
    """Which of kohya's names the file has."""
    style = kohya_names.style_of([layer.name for layer in layers.values()])
    if style is None:
        raise UsageError(
            f"{file} mixes names of two kinds (down_blocks and input_blocks, or lora_te_ and lora_te1_), and which "
            "layers they mean is not to be told",
            "save it again with the tool that made it",
        )
    return style


def _tensors(file: Path, layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    """The tensors, by their keys.

    Raises:
        UsageError: the file is cut off, or holds numbers that are none of a LoRA's.
        MeasureError: they are not finite.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for layer in layers.values() for key in layer.keys.values()}
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{file} is damaged or cut off: {error}", COPY_AGAIN) from None
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith(ALPHA):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"{file}: {key} holds {kind}, in which no factors are read", "save it in fp16")
    check_numbers(tensors, file)
    return tensors


class _Scales:
    """alpha / rank of every layer, as diffusers and kohya's scripts find it."""

    def __init__(
        self, layers: Mapping[str, _Layer], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path
    ) -> None:
        self.tensors, self.file = tensors, file
        with_alpha = [name for name, layer in layers.items() if ALPHA in layer.keys]
        without = next((name for name, layer in layers.items() if ALPHA not in layer.keys), None)
        if with_alpha and without:
            raise UsageError(
                f"{file} has an alpha for {with_alpha[0]} and none for {without}: tools read that in different ways",
                "save it again with the tool that made it",
            )
        self.configs = {} if with_alpha else _configs(metadata, file)
        self.patterns = {
            (part, key): PatternMap(_as_names(config.get(key) or {}), f"{file}: {part}.{key}")
            for part, config in self.configs.items()
            for key in ("rank_pattern", "alpha_pattern")
        }

    def of(self, name: str, layer: _Layer, rank: int) -> float:
        """The scale of a layer.

        Raises:
            UsageError: its alpha is none, or the metadata is of another file.
        """
        part, _, path = name.partition(".")
        config = self.configs.get(part)
        if ALPHA in layer.keys:
            key = layer.keys[ALPHA]
            if self.tensors[key].numel() != 1:
                raise UsageError(f"{self.file}: {key} holds more than one number", COPY_AGAIN)
            alpha: Any = self.tensors[key].item()
        elif config:
            announced = self.patterns[part, "rank_pattern"].first(path, config.get("r") or PEFT_DEFAULT)
            alpha = self.patterns[part, "alpha_pattern"].first(path, config.get("lora_alpha", PEFT_DEFAULT))
            if announced != rank:
                raise UsageError(
                    f"{self.file}: {name} has rank {rank}, and its metadata says {announced}",
                    "the metadata is of another file; save it again with the tool that made it",
                )
        elif self.configs:
            raise UsageError(
                f"{self.file}: its {METADATA} says nothing of {part}, of which it has layers",
                "save it again with the metadata of all parts, or with none",
            )
        else:
            return 1.0
        if alpha > LARGEST_ALPHA:
            raise UsageError(f"{self.file}: {name} has an alpha of {alpha:g}", COPY_AGAIN)
        if alpha <= 0:
            raise UsageError(
                f"{self.file}: {name} has an alpha of {alpha:g}; kohya's scripts read 0 as the rank, and diffusers as "
                "a layer that does nothing",
                "set it to what is meant",
            )
        return alpha / math.sqrt(rank) if config and config.get("use_rslora") else alpha / rank


def _configs(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of every part, from the metadata of diffusers; {} where there is none.

    Raises:
        UsageError: it cannot be read, or says that the factors are no plain LoRA.
    """
    text = metadata.get(METADATA)
    if not text:
        return {}
    try:
        said = loads(text)
    except BadJsonError as error:
        raise UsageError(f"{file}: {METADATA} is damaged: {error}", COPY_AGAIN) from None
    if not isinstance(said, dict):
        raise UsageError(f"{file}: {METADATA} is damaged: it is no object with keys", COPY_AGAIN)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        part, _, own = key.partition(".")
        if part in PARTS and own:
            configs.setdefault(part, {})[own] = value
    for part, config in configs.items():
        _check(config, f"{METADATA} of {part}", file)
    return configs


def _check(config: dict[str, Any], where: str, file: Path) -> None:
    """Refuse a configuration by which the factors are no plain LoRA."""
    fits(PeftForm, config, file)
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise UsageError(f"{file}: {where} says {key}, and the file has no tensors of that", COPY_AGAIN)
    for key, why in REFUSED.items():
        if config.get(key):
            raise UsageError(f"{file}: {where} says {key}: {why}, which is not supported", "use it with diffusers")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise UsageError(
            f"{file}: {where} says init_lora_weights {shown(start)}, which changed the base's weights too",
            "save it as a plain LoRA: PEFT's `path_initial_model_for_weight_conversion`",
        )


def _as_names(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns, of which those that are plain names are compared as texts; diffusers writes nothing else."""
    plain = re.compile(r"[\w.]+", re.ASCII)
    return {key.replace(".", r"\.") if plain.fullmatch(key) else key: value for key, value in patterns.items()}


def _factors(name: str, layer: _Layer, tensors: Mapping[str, Tensor], scales: _Scales, file: Path) -> Factors:
    """A layer's factors, with the scale in B.

    Raises:
        UsageError: one is missing, or their shapes do not go together.
    """
    try:
        a, b = tensors[layer.keys[DOWN]], tensors[layer.keys[UP]]
    except KeyError as error:
        raise UsageError(f"{file}: {name} lacks its lora_{error.args[0]}", COPY_AGAIN) from None
    shapes = f"{file}: {name} has factors {tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim not in (2, 4) or b.ndim not in (2, a.ndim):
        raise UsageError(
            f"{shapes}, which are neither of a linear layer nor of a convolution over a picture", "is it a LoRA?"
        )
    if b.ndim == 4 and b.shape[2:] != (1, 1):
        raise UsageError(
            f"{shapes}: its lora_up is no convolution of 1 x 1, so that it is no sum of components",
            "train with a kernel in lora_down alone, as diffusers and kohya's scripts do",
        )
    rank = a.shape[0]
    if not rank or rank != b.shape[1] or not a[0].numel() or not b.shape[0]:
        raise UsageError(f"{shapes}, which do not go together", COPY_AGAIN)
    scale = scales.of(name, layer, rank)
    kernel = tuple(a.shape[2:])
    return Factors(a.reshape(rank, -1), scale * b.reshape(len(b), rank), scale, kernel=kernel)


def _record_of(file: Path) -> dict[str, Any]:
    """dynlora.json beside the file, where it is of this one."""
    if not (file.parent / RECORD).is_file():
        return {}
    record = read_record(file.parent)
    return record if record.get("file") == file.name else {}
