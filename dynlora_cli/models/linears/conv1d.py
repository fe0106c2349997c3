"""GPT-2's Conv1D: a linear layer whose weight is [I, O]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

transposed = True
as_stored = True


def matches(cls: type) -> bool:
    return issubclass(cls, Conv1D)


def dense(base: nn.Module) -> Tensor:
    return weight_OI(base).detach().float()


def fuses(base: nn.Module) -> bool:
    return type(base) is Conv1D and base.weight.is_floating_point()


def weight_OI(base: nn.Module) -> Tensor:
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.T
