"""Packed adapters: two files, from which the adapter comes back exactly as it was packed.

adapter_packed.json
    format           "dynlora-packed"
    version          1
    adapter_config   adapter_config.json of the LoRA that it unpacks to: PEFT's own keys, at a scale of 1
    layers           [[name, inputs, outputs, bits], ...]; `bits` is a text with one digit, 1 to 8, for each component

adapter_packed.safetensors
    codes   uint8, one after the other: of each layer, in order, and each of its components the codes of a, then of b;
            a vector of n numbers in k bits takes ceil(n k / 8) bytes, the lowest bit of each number first
    steps   uint8, in the same order: a byte for every 64 numbers of a vector, ceil(n / 64) bytes
    ...     what is no factor, as PEFT names it, in float32: a classifier head, rows of new tokens, biases

A number is round(1024 Φ⁻¹((q + ½) / 2ᵏ)) / 1024 · 2^((c - 192) / 8), with its code q and the step's byte c, and Φ the
normal distribution; 0 where c is 0.

Dimensions: C components of a layer, I inputs, O outputs, V vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as to_bytes
from torch import Tensor

from dynlora_cli.adapters.adapter import PREFIX, Adapter, Factors
from dynlora_cli.adapters.find import PACKED, PACKED_WEIGHTS
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, VersionOne, fits, read_object, shown
from dynlora_cli.files.whole import write_text
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.rounding.bits import equal_lengths
from dynlora_cli.rounding.codes import groups_of, packed, quantized, restored, unpacked

FORMAT, VERSION = "dynlora-packed", 1
WIDEST = 1 << 24  # numbers of a vector
Bits = Mapping[str, list[int]]
_Width = Annotated[int, Field(ge=1, le=WIDEST)]
_Layer = tuple[
    Annotated[str, Field(min_length=1, max_length=1000)], _Width, _Width, Annotated[str, Field(pattern="^[1-8]+$")]
]


class Form(BaseModel):
    """The keys of adapter_packed.json."""

    model_config = ConfigDict(strict=False, extra="forbid")
    format: Literal["dynlora-packed"]
    version: VersionOne
    adapter_config: dict[str, Any]
    layers: Annotated[list[_Layer], Field(min_length=1)]


def in_svd_form(adapter: Adapter) -> Adapter:
    """The same update in components that are orthogonal, both vectors of each as long as the other."""
    turned = {name: f.turned(lambda a, b: equal_lengths(*svd_factors(a, b))) for name, f in adapter.layers.items()}
    return adapter.with_layers(turned)


def pack(adapter: Adapter, bits: Bits) -> tuple[Adapter, dict[str, tuple[bytes, bytes]]]:
    """An adapter as it comes back from so many bits, and the codes and steps of every layer.

    Args:
        adapter: of linear layers alone.
        bits: of each component of each layer; those with 0 are dropped.
    """
    layers: dict[str, Factors] = {}
    data: dict[str, tuple[bytes, bytes]] = {}
    for name, factors in adapter.layers.items():
        keep_C = torch.tensor(bits[name]) > 0
        if not keep_C.any():
            continue
        kept, of_C = factors.keep(keep_C), [each for each in bits[name] if each]
        a_CI, b_OC = equal_lengths(kept.a_CI, kept.b_OC)
        codes, steps = b"", b""
        a: list[Tensor] = []
        b: list[Tensor] = []
        for a_I, b_O, k in zip(a_CI, b_OC.T, of_C, strict=True):
            for x, into in ((a_I, a), (b_O, b)):
                q_1N, c_1G = quantized(x[None], k)
                codes, steps = codes + packed(q_1N, k), steps + c_1G.numpy().tobytes()
                into.append(restored(q_1N, c_1G, k)[0])
        layers[name] = Factors(torch.stack(a), torch.stack(b, 1), kept.scale, born=kept.born)
        data[name] = codes, steps
    return adapter.with_layers(layers), data


def write(
    folder: Path,
    adapter: Adapter,
    bits: Bits,
    data: Mapping[str, tuple[bytes, bytes]],
    files: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    """Write both files.

    Args:
        folder: exists.
        adapter, data: as `pack` gives them.
        bits: that they were packed with.
        files: adapter_config.json and the tensors of the adapter as PEFT has it.
    """
    config, tensors = files
    factors = {f"{PREFIX}{name}.{part}.weight" for name in adapter.layers for part in ("lora_A", "lora_B")}
    rest = {name: tensor.float().contiguous() for name, tensor in tensors.items() if name not in factors}
    blobs = {
        "codes": _blob(b"".join(data[name][0] for name in adapter.layers)),
        "steps": _blob(b"".join(data[name][1] for name in adapter.layers)),
    }
    layers = [
        [name, f.a_CI.shape[1], f.b_OC.shape[0], "".join(str(k) for k in bits[name] if k)]
        for name, f in adapter.layers.items()
    ]
    (folder / PACKED_WEIGHTS).write_bytes(to_bytes({**blobs, **rest}, metadata={"format": "pt"}))
    written = {"format": FORMAT, "version": VERSION, "adapter_config": config, "layers": layers}
    write_text(folder / PACKED, json.dumps(written, separators=(",", ":"), ensure_ascii=False) + "\n")


def read(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of the LoRA that an archive unpacks to; both are still to be checked.

    Args:
        folder: with both files.
        tensors: of adapter_packed.safetensors, as they are.

    Raises:
        UsageError: the archive is damaged, or is none of this version.
    """
    path = folder / PACKED
    form = fits(Form, read_object(path), path)
    names = [name for name, *_ in form.layers]
    if len(set(names)) < len(names):
        raise UsageError(f"{path} is damaged: a layer is there twice", COPY_AGAIN)
    for name in names:
        if not name.isprintable():
            raise UsageError(f"{path}: a layer's name {shown(name)} holds control characters", COPY_AGAIN)
    _check_sizes(form, tensors, folder / PACKED_WEIGHTS)
    found = {name: tensor for name, tensor in tensors.items() if name not in ("codes", "steps")}
    codes, steps = _Reader(tensors["codes"]), _Reader(tensors["steps"])
    for name, d_in, d_out, bits in form.layers:
        vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
        for k in map(int, bits):
            for numbers, into in zip((d_in, d_out), vectors, strict=True):
                q_1N = unpacked(codes.take(-(-numbers * k // 8)), numbers, k)
                into.append(restored(q_1N, steps.take(groups_of(numbers)), k)[0])
        for part, tensor in (("lora_A", torch.stack(vectors[0])), ("lora_B", torch.stack(vectors[1], 1))):
            key = f"{PREFIX}{name}.{part}.weight"
            if key in found:
                raise UsageError(f"{folder / PACKED_WEIGHTS} holds {key}, which is packed as well", COPY_AGAIN)
            found[key] = tensor.contiguous()
    return form.adapter_config, found


def _check_sizes(form: Form, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that there are as many bytes as the layers need, before any memory is taken for them."""
    wanted = {"codes": 0, "steps": 0}
    for _, d_in, d_out, bits in form.layers:
        for k in map(int, bits):
            wanted["codes"] += -(-d_in * k // 8) + -(-d_out * k // 8)
            wanted["steps"] += groups_of(d_in) + groups_of(d_out)
    for name, size in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != (size,):
            has = "no such tensor" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise UsageError(f"{path} is damaged: {name} must be {size:,} bytes, and there is {has}", COPY_AGAIN)


class _Reader:
    """Bytes, taken one after the other."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> Tensor:
        """The next bytes, as one row."""
        self.at += count
        return self.data[self.at - count : self.at][None]


def _blob(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
