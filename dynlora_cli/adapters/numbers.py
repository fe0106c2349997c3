"""The numbers in a file of tensors that somebody else may have made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.foreign import COPY_AGAIN

LARGEST = 1e12  # products with inputs stay far from fp32's end


def check_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors hold finite real numbers.

    Args:
        tensors: by name, of any type that a file may hold.
        path: of the file, for messages.

    Raises:
        UsageError: one holds complex numbers.
        MeasureError: a number is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise UsageError(f"{path}: {name} holds complex numbers, which no adapter has", COPY_AGAIN)
        # torch has no isfinite for some types of eight bits.
        if not (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all():
            raise MeasureError(f"{path}: {name} holds NaN or infinity", "train again with a lower learning rate")
