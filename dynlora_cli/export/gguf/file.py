"""GGUF files of whole models and of adapters, written tensor by tensor, and read back.

A model is checked against its config first; then tensors are read, converted and written one at a time, so memory is
bounded by the largest of them. An adapter's scale is exactly 1: llama.cpp divides alpha by each tensor's own rank, so
every layer is filled up with zeros to the largest rank, and alpha is that rank.

Dimensions: C components of a layer, R components of the largest layer, I inputs, O outputs.

Reference: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.export.gguf.architectures import BUFFERS, architecture
from dynlora_cli.export.gguf.form import Architecture, Entry, Value, from_gguf, to_gguf
from dynlora_cli.export.gguf.outtypes import OWN
from dynlora_cli.export.gguf.vocabulary import Vocabulary, load_tokenizer, vocabulary

_BLOCK = 32  # q8_0 stores a scale for every so many values of a row


def write_model(
    path: Path,
    config: dict[str, Any],
    tokenizer_folder: Path,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    kind: str,
) -> dict[str, Any]:
    """Write a model with its tokenizer as one GGUF file; the file appears whole or not at all.

    Args:
        path: of the file.
        config: content of the model's config.json.
        tokenizer_folder: with tokenizer.json.
        names: of the tensors that there are, as in transformers' safetensors files.
        read: gives the tensor of one name, on any device, in any float type.
        kind: f32 | f16 | q8_0, of the matrices. Norms and biases stay f32; rows that q8_0 cannot take become f16.

    Returns:
        path, bytes, tensors, architecture, kind, notes (lines for people: where llama.cpp differs).

    Raises:
        UsageError: model or tokenizer have no GGUF form, a tensor is missing, unknown, or of another shape.
        MachineError: the package gguf is missing.
    """
    gguf = _package()
    if kind not in OWN:
        raise UsageError(f"{kind!r} is no kind of GGUF tensors here", f"choose one of {', '.join(OWN)}")
    arch = architecture(config)
    words = vocabulary(load_tokenizer(tokenizer_folder), arch.vocab_size, config)
    sources = _sources(arch, names, read)
    with _writing(gguf, path, arch) as writer:
        writer.add_type("model")
        writer.add_file_type(OWN[kind])
        if kind == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_keys(writer, arch.keys | words.keys)
        _add_tokens(writer, words)
        for name, factors in arch.factors.items():
            _declare(gguf, writer, name, (len(factors),), "f32")
        for entry in arch.entries:
            _declare(gguf, writer, entry.gguf, entry.gguf_shape, _kind_of(entry, kind))
        _open(writer)
        for factors in arch.factors.values():
            writer.write_tensor_data(np.array(factors, np.float32))
        for name, group in groupby(arch.entries, lambda entry: entry.name):
            tensor = read(sources[name])
            for entry in group:
                writer.write_tensor_data(_encode(gguf, entry, tensor, _kind_of(entry, kind)))
    tensors = len(arch.entries) + len(arch.factors)
    facts = {"path": str(path), "bytes": path.stat().st_size, "tensors": tensors, "architecture": arch.name}
    return facts | {"kind": kind, "notes": arch.notes + words.notes}


def write_adapter(path: Path, config: dict[str, Any], layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Write an adapter as a GGUF file that llama.cpp applies with a scale of exactly 1; f32.

    Args:
        path: of the file.
        config: content of the base model's config.json.
        layers: a_CI and b_OC by module name; the layer's change is b_OC @ a_CI, whatever its C.

    Returns:
        path, bytes, tensors, rank, architecture, notes.

    Raises:
        UsageError: llama.cpp cannot adapt one of the modules; the message names all of them.
        MachineError: the package gguf is missing.
    """
    gguf = _package()
    arch = architecture(config)
    entries = _adaptable(arch, layers)
    rank = max(a_CI.shape[0] for a_CI, _ in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].gguf):
        a_CI, b_OC = (factor.detach().to("cpu", torch.float32) for factor in layers[name])
        a_RI, b_OR = a_CI.new_zeros(rank, a_CI.shape[1]), b_OC.new_zeros(b_OC.shape[0], rank)
        a_RI[: a_CI.shape[0]], b_OR[:, : b_OC.shape[1]] = a_CI, b_OC
        # Rows of the change are rows of B, so B is interleaved as the matrix is.
        rows = Entry(name, entry.gguf, tuple(b_OR.shape), entry.heads)
        tensors[f"{entry.gguf}.lora_a"], tensors[f"{entry.gguf}.lora_b"] = a_RI, to_gguf(rows, b_OR)
    with _writing(gguf, path, arch) as writer:
        writer.add_type("adapter")
        writer.add_file_type(OWN["f32"])
        _add_keys(writer, {"adapter.type": "lora", "adapter.lora.alpha": float(rank)})
        for name, tensor in tensors.items():
            _declare(gguf, writer, name, tuple(tensor.shape), "f32")
        _open(writer)
        for tensor in tensors.values():
            writer.write_tensor_data(tensor.contiguous().numpy())
    facts = {"path": str(path), "bytes": path.stat().st_size, "tensors": len(tensors), "rank": rank}
    return facts | {"architecture": arch.name, "notes": arch.notes}


def read_model(path: Path, config: dict[str, Any]) -> Callable[[str], Tensor]:
    """A reader of a GGUF file's tensors under transformers' names, in transformers' layout, as fp32.

    Args:
        path: of a model that `write_model`, or llama.cpp's own converter, made.
        config: content of the model's config.json.

    Returns:
        A function of a name, such as `model.norm.weight`. It raises UsageError for a tensor that the file lacks.
    """
    gguf = _package()
    arch = architecture(config)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> Tensor:
        entries = arch.named(name)
        if not entries or any(entry.gguf not in found for entry in entries):
            raise UsageError(f"{path} has no tensor for {name}")
        parts = []
        for entry in entries if entries[0].rows else entries[:1]:  # else the others are copies
            stored = found[entry.gguf]
            values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
            parts.append(from_gguf(entry, values.reshape(entry.gguf_shape)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    return read


def tensor_types(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape, slowest dimension first, and GGUF's type of every tensor of a file."""
    tensors = _package().GGUFReader(path).tensors
    return {tensor.name: (tuple(int(n) for n in tensor.shape[::-1]), tensor.tensor_type.name) for tensor in tensors}


def read_adapter(path: Path, config: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What llama.cpp makes of an adapter: a_CI and b_OC by module name, with alpha / rank, by its own rule, in b_OC.

    Args:
        path: of the adapter.
        config: content of the base model's config.json.

    Raises:
        UsageError: the file is no LoRA adapter for this model.
    """
    gguf = _package()
    arch = architecture(config)
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha")
    kinds = [reader.get_field(key) for key in ("general.type", "adapter.type", "general.architecture")]
    if alpha is None or [kind and kind.contents() for kind in kinds] != ["adapter", "lora", arch.name]:
        raise UsageError(f"{path} is no LoRA adapter for the architecture {arch.name}")
    factors = {tensor.name: torch.from_numpy(tensor.data.astype(np.float32)) for tensor in reader.tensors}
    modules = {entry.gguf: entry for entry in arch.entries}
    layers = {}
    for name, a_CI in factors.items():
        base, _, factor = name.rpartition(".")
        if factor == "lora_a":
            entry, b_OC = modules.get(base), factors.get(f"{base}.lora_b")
            if entry is None or b_OC is None:
                raise UsageError(f"{path}: {name} belongs to no matrix of this model, or has no lora_b beside it")
            scale = float(alpha.contents()) / a_CI.shape[0]
            rows = Entry(entry.name, base, tuple(b_OC.shape), entry.heads)
            layers[entry.name.removesuffix(".weight")] = a_CI, scale * from_gguf(rows, b_OC)
    return layers


def _package() -> ModuleType:
    """The package gguf, which is an optional one."""
    try:
        import gguf
        import gguf.quants
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise  # it is there, and broken
        raise MachineError("reading and writing GGUF needs the package gguf", 'pip install "dynlora[gguf]"') from error
    return gguf


@contextmanager
def _writing(gguf: ModuleType, path: Path, arch: Architecture) -> Iterator[Any]:
    """Yield a writer to a name beside `path` that is renamed to it if the block succeeds, and removed if not."""
    temporary = path.with_name(f".{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, arch.name)
    try:
        try:
            yield writer
        finally:
            writer.close()
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # numpy raises this when fewer bytes were written than asked for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sources(arch: Architecture, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Names to read by names of entries: all that the model has, and nothing that it has not."""
    given = [name for name in names if not BUFFERS.search(name)]
    if arch.tied and "lm_head.weight" in given:
        given.remove("lm_head.weight")
        embedding = next((name for name in given if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
        if embedding and not torch.equal(read("lm_head.weight"), read(embedding)):
            raise UsageError(
                f"config.json ties lm_head to {embedding}, but the weights differ",
                "set tie_word_embeddings to false in config.json",
            )
    found = {name: arch.named(name) for name in given}
    unknown = sorted(name for name, entries in found.items() if not entries)
    sources = {entries[0].name: name for name, entries in found.items() if entries}
    missing = sorted(set(arch.by_name) - set(sources))
    for what, some in (("has no place for", unknown), ("needs", missing)):
        if some:
            shown = ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")
            raise UsageError(
                f"a {arch.name} model of this config.json {what} {shown}",
                "config.json and the weights must be of the same model",
            )
    return sources


def _adaptable(arch: Architecture, layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Entry]:
    """Entries of the weights of some modules, all of them matrices that llama.cpp adapts."""
    entries: dict[str, Entry] = {}
    refused = []
    for name, (a_CI, b_OC) in layers.items():
        entry = next(iter(arch.named(f"{name}.weight")), None)
        if entry is None or entry.exact or entry.gguf == "token_embd.weight":
            refused.append(name)
            continue
        outputs, inputs = entry.gguf_shape
        if (b_OC.shape[0], a_CI.shape[1]) != (outputs, inputs) or a_CI.shape[0] != b_OC.shape[1]:
            raise UsageError(
                f"{name}: factors {list(a_CI.shape)} and {list(b_OC.shape)} do not fit a matrix {[outputs, inputs]}"
            )
        entries[name] = entry
    if refused or not entries:
        raise UsageError(
            f"llama.cpp takes no adapter for {', '.join(refused)}" if refused else "the adapter has no layer",
            "export with `--to merged-gguf`, which puts the change into the weights",
        )
    return entries


def _kind_of(entry: Entry, kind: str) -> str:
    if entry.exact or len(entry.shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and entry.gguf_shape[-1] % _BLOCK else kind


def _encode(gguf: ModuleType, entry: Entry, tensor: Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor in the file."""
    values = to_gguf(entry, tensor.detach().to("cpu", torch.float32)).contiguous().numpy()
    if kind == "f32":
        return values
    if kind == "f16":
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise UsageError(f"{entry.name} has values that f16 cannot hold", "write f32 or q8_0")
        return values.astype(np.float16)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)


def _declare(gguf: ModuleType, writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announce a tensor; they are written in the order of announcement."""
    if kind == "q8_0":
        bytes_shape = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType.Q8_0)
        size = int(np.prod(bytes_shape))
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, gguf.GGMLQuantizationType.Q8_0)
        return
    dtype: np.dtype = np.dtype({"f32": np.float32, "f16": np.float16}[kind])
    writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)


def _add_keys(writer: Any, keys: Mapping[str, Value]) -> None:
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def _add_tokens(writer: Any, words: Vocabulary) -> None:
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)


def _open(writer: Any) -> None:
    """Write all that stands before the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
