"""What the trained routers have in common: numbers by which each token, in each layer, weighs frozen adapters.

A router is a variant (a file of lora/variants/ with `routes = True`), and its class `Gates` is one under `Gates` here.
It is made for the layers that hold the adapters side by side (lora/multi.py), trains, and is saved by itself.

Dimensions, as suffixes of names:
    B  rows of a batch                  E  adapters of the router; E' those that have components in a layer
    N  rows of tokens                   R  components of a layer, all adapters together
    I  inputs of the layer (d_in)       O  outputs of the layer (d_out)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.multi import MultiLinear

SEPARATOR = "/"  # in the names of parameters, which may hold no dot


class Gates(nn.Module):
    """The numbers of a router, and what it makes of them.

    Args:
        layers: that hold the adapters, by name.
        names: of the adapters, in the order of their columns.
        options: the variant's own keys, as attributes.
        hidden: width of the model's hidden states.

    Attributes:
        off: columns of the adapters that are left out; the others share their weight where weights add up to 1.
        owner_B: in training, the column of the adapter that each row of the batch belongs to; None: nobody says.
    """

    title = "router"
    mixes_kinds = False  # True: it also weighs adapters that are no plain LoRA, such as a DoRA

    def __init__(self, layers: Mapping[str, MultiLinear], names: Sequence[str], options: Any, hidden: int = 0) -> None:
        super().__init__()
        self.names, self.options, self.hidden = tuple(names), options, hidden
        self.off: frozenset[int] = frozenset()
        self.owner_B: Tensor | None = None
        self.numbers = nn.ParameterDict()
        for name, layer in layers.items():
            for what, value in self.start(layer).items():
                self.numbers[_key(name, what)] = nn.Parameter(value.to(layer.device))

    # -- what a router says --------------------------------------------------------------------------------------------

    def start(self, layer: MultiLinear) -> dict[str, Tensor]:  # noqa: ARG002
        """The first values of the numbers that a layer has, by what they are called; fp32."""
        return {}

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """What each token takes of the layer's adapters, see `lora.multi.TokenGates`. [N, E']"""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of an optimizer step, or None; called once after its forward passes."""
        return None

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:  # noqa: ARG002
        """Inside the block the router sees what it needs of the model's passes beside the inputs of its layers."""
        yield

    # ------------------------------------------------------------------------------------------------------------------

    def of(self, layer: MultiLinear, what: str) -> Tensor:
        """A number of a layer."""
        return self.numbers[_key(layer.name, what)]

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by name."""
        return {key.replace(SEPARATOR, "."): value.detach() for key, value in self.numbers.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file.

        Raises:
            ValueError: they are another router's; says what does not fit.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            strange = min(own.keys() ^ tensors.keys())
            raise ValueError(f"{'lacks' if strange in own else 'holds a strange tensor'} {strange}")
        for name, value in own.items():
            if value.shape != tensors[name].shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)} there and {tuple(value.shape)} here")
            value.copy_(tensors[name])

    def shares(self, logits_NE: Tensor, layer: MultiLinear, top: int | None = None) -> Tensor:
        """The softmax over the adapters of a layer that are not left out; 0 for all others. [N, E']

        Args:
            logits_NE: [N, E'], fp32.
            layer: whose adapters they are.
            top: only so many of them get a share, the largest.
        """
        on = sum(column not in self.off for column in layer.adapters)
        if not on:
            return torch.zeros_like(logits_NE)
        if on < len(layer.adapters):
            logits_NE = logits_NE.masked_fill(self.off_of(layer), -torch.inf)
        if top is not None and top < on:
            least_N1 = logits_NE.topk(top, -1).values[:, -1:]
            logits_NE = logits_NE.masked_fill(logits_NE < least_N1, -torch.inf)
        return logits_NE.softmax(-1)

    def off_of(self, layer: MultiLinear) -> Tensor:
        """Which adapters of a layer are left out. [E'], boolean"""
        return torch.tensor([column in self.off for column in layer.adapters], device=layer.device)

    def owners(self, layer: MultiLinear, rows: int) -> Tensor | None:
        """In training, where it is known: 1 at the adapter that a token's row belongs to, else 0. [N, E']"""
        if self.owner_B is None or not layer.training:
            return None
        owner_N = self.owner_B.repeat_interleave(rows // len(self.owner_B))
        return (owner_N[:, None] == torch.tensor(layer.adapters, device=owner_N.device)).float()


def _key(layer: str, what: str) -> str:
    return f"{layer}.{what}".replace(".", SEPARATOR)
