"""A model that holds no weights: each module reads its own when it runs, and forgets them.

    model = streamed(place)
    read_by(model, reader(Layout(Weights(place.folder), model)))

So a check of a merged or exported model needs no more memory than its largest tensor, as the merge itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError
from dynlora_cli.models.alone import making_a_model
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.load import load_structure
from dynlora_cli.models.place import Place

Read = Callable[[str], Tensor]


def reader(layout: Layout, whole: Mapping[str, Tensor] | None = None) -> Read:
    """Reads the model's parameters, by their names in it, from files: fp32, one at a time.

    Args:
        layout: where the parameters lie in the files.
        whole: tensors to use instead of those in the files.
    """

    weights = layout.weights

    def tensor(name: str) -> Tensor:
        return weights.read(name, torch.float32 if weights.entries[name].dtype.is_floating_point else None)

    def read(name: str) -> Tensor:
        found = layout.find(name)
        if found is None:
            raise UsageError(f"{weights.folder} has no tensor for {name}", "the model's files and its config disagree")
        return layout.read(found, tensor)

    return lambda name: whole[name].float() if whole and name in whole else read(name)


def through_ties(read: Read, model: PreTrainedModel) -> Read:
    """Reads a parameter, or the one whose weight it shares, such as the input table for the output head."""
    shared = model.all_tied_weights_keys
    return lambda name: read(shared.get(name, name))


def unreadable(layout: Layout, whole: Collection[str]) -> list[str]:
    """Parameters that the files lack, or hold in a form that is not understood."""
    names = (name for name, _ in layout.model.named_parameters(remove_duplicate=False))
    return [name for name in names if name not in whole and layout.find(name) is None]


def streamed(place: Place) -> PreTrainedModel:
    """The model of a folder without its weights, in evaluation mode; `read_by` makes it run, in fp32 on the CPU."""
    with making_a_model(), init_empty_weights(include_buffers=False), _NoDraws():
        model = load_structure(place.options, place.folder, place.labels, device=None)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def _on_the_cpu(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class, whose `device` is where it computes: some models move their inputs there."""
    device = property(lambda _self: torch.device("cpu"))
    return type(kind.__name__, (kind,), {"device": device, "__module__": kind.__module__})


def read_by(model: PreTrainedModel, read: Read) -> None:
    """Let every module read its parameters when it runs, by their names in the model, and forget them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters:
            _stream(module, name, read)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__class__ = _on_the_cpu(type(part))


class _NoDraws(TorchFunctionMode):
    """Skips the random initialization: nobody reads it, and memory that is never touched costs nothing."""

    SKIPPED = (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, init.kaiming_uniform_, init.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.SKIPPED and isinstance(args[0] if args else kwargs.get("tensor"), nn.Parameter):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _Table(dict[str, Any]):
    """A module's parameters, read on each access: some models use a weight without calling its module."""

    def __init__(self, parameters: Mapping[str, Any], read: Read) -> None:
        super().__init__(parameters)
        self.read = read

    def __getitem__(self, leaf: str) -> Any:
        value = super().__getitem__(leaf)
        return nn.Parameter(self.read(leaf), requires_grad=False) if value is not None and value.is_meta else value


def _stream(module: nn.Module, name: str, read: Read) -> None:
    empty = dict(module._parameters)

    def own(leaf: str) -> Tensor:
        return read(f"{name}.{leaf}" if name else leaf)

    def fetch(module: nn.Module, _inputs: Any) -> None:
        for leaf, parameter in empty.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(own(leaf), requires_grad=False)

    def forget(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        module._parameters.update(empty)

    module._parameters = _Table(empty, own)
    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(forget, always_call=True)
