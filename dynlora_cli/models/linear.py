"""Linear layers of the base, of whichever kind: a file of models/linears/ knows each kind. It holds these names:

matches(cls) -> bool
    Whether layers of this class are of this kind. The file `linear` is asked last.

dense(base) -> Tensor
    The weight that the layer multiplies with, [O, I] in fp32.

transposed = True
    Optional: `base.weight` is [I, O].

as_stored = True
    Optional: what the model's files hold is the weight that the layer multiplies with. An adapter can be merged into
    such layers alone.

quantized = True
    Optional: the weight is kept in few bits.

fuses(base) -> bool
    Optional: whether base and components can run as one autograd function (kernels/fused_lora.py) at this moment. Then

weight_OI(base) -> Tensor
    gives the weight for it, in `weight_type(base)`, by default the type of `base.weight`.

forget(y) -> None
    Optional: frees what the base's product `y` keeps for a gradient of the weight, which is frozen here.

Dimensions: I inputs, O outputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from dynlora_cli import plugins

LAST = "linear"
_OF_CLASS: dict[type, ModuleType | None] = {}  # asked in every forward pass


def kind_of(base: nn.Module) -> ModuleType:
    """The file that knows a layer; `linear` for a module that is no linear layer, and has a weight [O, I]."""
    return _known(type(base)) or plugins.load("linears", LAST)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a kind that is known."""
    return _known(type(module)) is not None


def is_plain(module: nn.Module) -> bool:
    """Whether no file but `linear` knows a module."""
    return kind_of(module) is plugins.load("linears", LAST)


def is_transposed(base: nn.Module) -> bool:
    """Whether a layer's weight is [I, O]."""
    return getattr(kind_of(base), "transposed", False)


def _known(cls: type) -> ModuleType | None:
    if cls not in _OF_CLASS:
        names = sorted(plugins.names("linears"), key=lambda name: (name == LAST, name))
        kinds = [plugins.load("linears", name) for name in names]
        _OF_CLASS[cls] = next((kind for kind in kinds if kind.matches(cls)), None)
    return _OF_CLASS[cls]


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, or of any module with a weight [O, I]."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features  # type: ignore[return-value]
    first, second = base.weight.shape  # type: ignore[misc]
    return (first, second) if is_transposed(base) else (second, first)


def dense_weight(base: nn.Module) -> Tensor:
    """The weight that a layer multiplies with, dequantized where it is kept in few bits. [O, I], fp32"""
    return kind_of(base).dense(base)


def fusable(base: nn.Module) -> bool:
    """Whether a layer is no more than a product with a frozen weight, and perhaps a bias, for a kernel."""
    kind = kind_of(base)
    if not hasattr(kind, "fuses") or base._forward_hooks or base._forward_pre_hooks:
        return False
    return not base.weight.requires_grad and kind.fuses(base)


def weight_type(base: nn.Module) -> torch.dtype:
    """The dtype of what `weight_OI` returns."""
    kind = kind_of(base)
    return kind.weight_type(base) if hasattr(kind, "weight_type") else base.weight.dtype  # type: ignore[return-value]


def weight_OI(base: nn.Module) -> Tensor:
    """The weight of a layer that is `fusable`: [O, I], a view where it need not be dequantized."""
    return kind_of(base).weight_OI(base)


def forget_input(base: nn.Module, y: Tensor) -> Tensor:
    """Free what a frozen layer's product keeps for a gradient of its weight; returns the product."""
    if not torch.compiler.is_compiling():  # looking into the autograd graph would break a compiled one
        kind = kind_of(base)
        if hasattr(kind, "forget"):
            kind.forget(y)
    return y
