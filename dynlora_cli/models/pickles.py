"""Weights in pytorch_model.bin: where each tensor lies in the file, found without running or loading anything.

Such a file is a ZIP archive of a pickle and of the tensors' plain bytes. torch's reader for untrusted pickles knows
tensors and containers alone and calls nothing else; with tensors that hold no numbers it tells where their bytes are.
So a base in this form is read, fingerprinted and merged like one in safetensors.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dynlora_cli.errors import UsageError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_CONVERT = (
    'if you trust whoever made it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('NEW')\", and copy the tokenizer's files"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `start` counts bytes from the file's first."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        UsageError: it is damaged, holds anything but tensors, or is of another form than PyTorch has written since 1.6.
    """
    try:
        with FakeTensorMode():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(
            f"{file} is damaged, or a pickle that holds more than tensors; nothing in it was run",
            "fetch the model again, or one with safetensors files",
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"{file} holds no tensors by name", "fetch the model again, or one with safetensors files")
    found = {str(name): _stored(file, str(name), t) for name, t in state.items() if isinstance(t, Tensor)}
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _stored(file: Path, name: str, tensor: Tensor) -> Stored:
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        reason = (
            "is a view that is not stored row by row" if start is not None else "lies in a form older than PyTorch 1.6"
        )
        raise UsageError(f"{file}: {name} {reason}, which training and merging cannot share", _CONVERT)
    return Stored(tensor.dtype, tuple(tensor.shape), start + tensor.storage_offset() * tensor.dtype.itemsize)
