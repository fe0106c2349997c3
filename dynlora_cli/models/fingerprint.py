"""What identifies a base model: a hash of its config and of its files' headers, and one of a few of its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_cli.models.weights import Weights, entries_of, read_header

SAMPLED_BYTES = 64  # read from the middle of every tensor


def fingerprint(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the weights without reading them: config, headers and shard sizes, as SHA-256.

    `transformers_version` and the like are left out of the config, since they do not change the model. Two fine-tunes
    of one model agree in all that, so `sampled_sha256` is over a few numbers of every tensor.

    Raises:
        UsageError: a file is damaged, or a pickle in a form that is not read.
    """
    sampled, shards = hashlib.sha256(), {}
    files = sorted(folder.glob("*.safetensors")) or Weights(folder).files
    for file in files:
        header = _sample(file, sampled)
        shards[file.name] = {"header_sha256": hashlib.sha256(header).hexdigest(), "bytes": file.stat().st_size}
    return _identity(config, shards) | {"sampled_sha256": sampled.hexdigest(), "shards": shards}


def _identity(config: Mapping[str, Any], shards: dict[str, Any]) -> dict[str, str]:
    volatile = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
    lasting = {key: value for key, value in config.items() if key not in volatile}
    return {"sha256": hashlib.sha256(json.dumps([lasting, shards], sort_keys=True).encode()).hexdigest()}


def changed_since(before: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> str | None:
    """How a model differs from the fingerprint on record, in words; None if it does not.

    Version 0.1 looked at safetensors alone, so its record of a base in pytorch_model.bin tells the config and no more.
    """
    if before.get("shards") == {}:
        now: dict[str, Any] = _identity(config, {})
    else:
        now = fingerprint(folder, config)
    for key, what in (("sha256", "its config, tensors or sizes differ"), ("sampled_sha256", "its numbers differ")):
        if key in now and before.get(key) and now[key] != before[key]:
            return what
    return None


def _sample(path: Path, sampled: Any) -> bytes:
    """The header of a file of weights; `sampled` is updated with a few numbers of each of its tensors."""
    if path.suffix == ".safetensors":
        header, tensors = read_header(path)
        places = {name: [8 + len(header) + at for at in info["data_offsets"]] for name, info in tensors.items()}
    else:
        entries = entries_of(path)
        places = {name: [entry.start, entry.start + entry.size] for name, entry in entries.items()}
        header = json.dumps([[name, str(e.dtype), e.shape] for name, e in sorted(entries.items())]).encode()
    with path.open("rb") as file:
        for _, (first, last) in sorted(places.items()):
            middle = (first + last) // 2
            file.seek(middle)
            sampled.update(file.read(min(SAMPLED_BYTES, last - middle)))
    return header
