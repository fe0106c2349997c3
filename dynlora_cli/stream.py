"""A model that holds no weights: each module reads its own when it runs, and forgets them.

So a check of a merged or exported model needs no more memory than its largest tensor, as the merge itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dynlora_cli.adapter_base import Place, tied
from dynlora_cli.errors import UsageError
from dynlora_cli.model import load_structure
from dynlora_cli.weights import Weights

Read = Callable[[str], Tensor]


def reader(weights: Weights, model: PreTrainedModel, whole: Mapping[str, Tensor] | None = None) -> Read:
    """Reads the model's parameters, by their names in it, from files: fp32, one at a time.

    Args:
        weights: the files.
        model: knows which names share one tensor.
        whole: tensors that stand in the place of the files'.
    """

    def read(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        found = weights.locate(module, leaf)
        if found is None:
            raise UsageError(f"{weights.folder} has no tensor for {name}", "the model's files and its config disagree")
        return weights.read(found, torch.float32 if weights.entries[found].dtype.is_floating_point else None)

    base = through_ties(read, model)
    return lambda name: whole[name].float() if whole and name in whole else base(name)


def through_ties(read: Read, model: PreTrainedModel) -> Read:
    """Reads the input table where the model's output head shares its weight."""
    shared = tied(model)
    if shared is None:
        return read
    table, head = (f"{module}.weight" for module in shared)
    return lambda name: read(table if name == head else name)


def streamed(place: Place, read: Callable[[PreTrainedModel], Read]) -> PreTrainedModel:
    """The model of a folder, in evaluation mode, computing in fp32 on the CPU.

    Args:
        place: the folder and how to read its config.
        read: gives, for the model's structure, what reads a parameter by its name.
    """
    with init_empty_weights(include_buffers=False), _NoDraws():
        model = load_structure(place.options, place.folder, place.labels, device=None)
    model.eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    source = read(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters:
            _stream(module, name, source)
    return model


class _NoDraws(TorchFunctionMode):
    """Random starts are not drawn: nobody reads them, and untouched memory costs nothing."""

    SKIPPED = (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, init.kaiming_uniform_, init.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.SKIPPED and isinstance(args[0] if args else kwargs.get("tensor"), nn.Parameter):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _stream(module: nn.Module, name: str, read: Read) -> None:
    empty = dict(module._parameters)

    def fetch(module: nn.Module, _inputs: Any) -> None:
        for leaf, parameter in empty.items():
            if parameter is not None:
                value = read(f"{name}.{leaf}" if name else leaf)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def forget(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(forget, always_call=True)
