"""The model without its components, for losses that compare with it (DPO, KTO, GRPO with beta), in no further memory.

TRL turns the adapters of a `PeftModel` off to compute a reference. For any other model it loads a second one. Ours need
not cost that: the base is frozen, so a second tree of modules can hold the very same tensors.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynlora_cli.errors import UsageError

if TYPE_CHECKING:
    from dynlora_cli.lora.pool import Pool

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def reference(model: nn.Module, pool: Pool, *ours: object) -> nn.Module:
    """A model of the same class that computes what `model` computes without components. It shares every tensor.

    Args:
        model: holds the pool's layers.
        pool: the components.
        ours: objects that the model may refer to and that must not be copied.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    shared |= {id(thing): thing for thing in (pool, *ours)}
    shared |= {id(layer): layer.base for layer in pool.layers.values()}
    other = copy.deepcopy(model, shared)
    for module in other.modules():
        _forget_ours(module)
    return other.eval()


def _forget_ours(module: nn.Module) -> None:
    """Drop the hooks and methods that this package put on one module."""
    for name in _HOOKS:
        hooks = module.__dict__.get(name, {})
        for key, hook in list(hooks.items()):
            if _is_ours(hook):
                del hooks[key]
    for name, value in list(module.__dict__.items()):
        if _is_ours(value if callable(value) else type(value)):
            del module.__dict__[name]


def _is_ours(function: Any) -> bool:
    function = getattr(function, "hook", function)  # torch wraps hooks of loading
    return str(getattr(function, "__module__", "")).startswith("dynlora_cli.")


def share(other: nn.Module, model: nn.Module, pool: Pool) -> int:
    """Let another model of the same base hold this model's frozen tensors, instead of equal ones of its own.

    Args:
        other: as a trainer loaded it.
        model: holds the pool's layers.
        pool: the components.

    Returns:
        Bytes of `other` that are given back.

    Raises:
        UsageError: a tensor of `other` is not equal to ours, or not in our model.
    """
    leaves = set(map(id, pool.leaves))
    inside = {f"{name}.base.": f"{name}." for name in pool.layers}
    ours: dict[str, nn.Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) not in leaves:
            layer = next((layer for layer in inside if name.startswith(layer)), "")
            ours[inside[layer] + name.removeprefix(layer) if layer else name] = tensor
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for name, tensor in theirs.items():
        if name not in ours or not _equal(ours[name], tensor):
            raise UsageError(
                f"the reference model's {name} is not that of the base, so the two cannot share it",
                "keep the second model, if its other weights are meant",
            )
    own = {id(tensor): tensor for name, tensor in theirs.items() if tensor is not ours[name]}
    for name in theirs:
        folder, _, leaf = name.rpartition(".")
        other.get_submodule(folder)._parameters[leaf] = ours[name]
    return sum(tensor.numel() * tensor.element_size() for tensor in own.values())


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
