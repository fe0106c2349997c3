"""Experts that lie in one tensor, as one linear layer for each, so that every expert can have a rank of its own.

In a mixture of experts a module `experts` holds gate_up_proj [E, 2·width, H] and down_proj [E, H, width].

    split, join    give such modules a linear layer `experts.3.down_proj` per slice, and take them away again
    fuse, unfuse   the factors of all slices of a parameter as PEFT's `target_parameters` stores them, and back

Dimensions: C components of a slice, R of the slice with the most, E experts, I inputs, O outputs, N tokens, H numbers
of a token, T experts that a token is sent to.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from dynlora_cli.errors import UsageError

PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which modules register them
WORD = "experts"  # the modules' name, and what a recipe calls them


class ExpertSlice(nn.Module):
    """One expert's slice of a parameter, as a linear layer without numbers of its own."""

    bias = None

    def __init__(self, experts: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        self.holder = (experts,)  # in a tuple, or the module would contain itself
        self.parameter, self.expert = parameter, expert
        self.experts, self.out_features, self.in_features = experts.get_parameter(parameter).shape

    @property
    def weight(self) -> Tensor:
        """A view. [O, I]"""
        return getattr(self.holder[0], self.parameter)[self.expert]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return F.linear(x, self.weight)


def fused_experts(model: nn.Module) -> dict[str, int]:
    """The modules that hold the weights of many experts in one tensor [experts, ..., ...], and how many experts."""
    found = {}
    for name, module in model.named_modules():
        counts = [len(p) for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) > 1]
        if counts and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            found[name] = counts[0]
    return found


def split(model: nn.Module, *, others: bool = False) -> None:
    """Let all fused experts compute through `ExpertSlice`s, in place; the model's output stays the same.

    Args:
        model: changed.
        others: leave experts of another form as they are.

    Raises:
        UsageError: experts of another form.
    """
    for name, count in fused_experts(model).items():
        module: Any = model.get_submodule(name)
        if not _understood(module) or name.split(".")[-1] != WORD:
            if others:
                continue
            raise UsageError(
                f"the experts in {name} are not stored as gate_up_proj and down_proj, [experts, outputs, inputs] each",
                "leave experts out of adapter.target_modules",
            )
        if "0" in module._modules:
            continue
        for expert in range(count):
            slices = {parameter: ExpertSlice(module, parameter, expert) for parameter in PARAMETERS}
            module.add_module(str(expert), nn.ModuleDict(slices))
        module.forward = MethodType(_expert_by_expert, module)


def join(model: nn.Module) -> None:
    """Undo `split`."""
    for name, count in fused_experts(model).items():
        module: Any = model.get_submodule(name)
        for expert in range(count if "0" in module._modules else 0):
            del module._modules[str(expert)]
        vars(module).pop("forward", None)


def _understood(module: Any) -> bool:
    """Whether a forward pass is what `_expert_by_expert` does; transformers' own attributes say it."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    plain = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", False)
    return names == [*PARAMETERS] and plain and not module.is_transposed and not module.has_bias


def _expert_by_expert(self: Any, x_NH: Tensor, chosen_NT: Tensor, weights_NT: Tensor) -> Tensor:
    """What the experts of each token make of it, weighed and summed; transformers' own, through the slices."""
    order = chosen_NT.flatten().argsort(stable=True)  # all that goes to expert 0 first
    inputs = x_NH[order // chosen_NT.shape[1]].split(_load(chosen_NT, len(self.down_proj)))
    outputs = []
    for expert, x in enumerate(inputs):
        if len(x):
            own = getattr(self, str(expert))
            outputs.append(own.down_proj(self._apply_gate(own.gate_up_proj(x))))
    y_NTH = torch.cat(outputs)[order.argsort()].view(*chosen_NT.shape, -1)
    return (y_NTH * weights_NT.unsqueeze(-1)).sum(1).to(x_NH.dtype)


def _load(chosen_NT: Tensor, experts: int) -> list[int]:
    """How many inputs each expert gets; alike, where tensors have no numbers (see training/memory_estimate.py)."""
    if isinstance(chosen_NT, FakeTensor):
        total = chosen_NT.numel()
        return [total * (expert + 1) // experts - total * expert // experts for expert in range(experts)]
    return chosen_NT.flatten().bincount(minlength=experts).tolist()


# -- files -------------------------------------------------------------------------------------------------------------
