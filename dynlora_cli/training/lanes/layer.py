"""A linear layer of the base under the components of several runs, each of which adds its own to its own rows.

Dimensions: B rows and T tokens of a joint pass, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynlora_cli.errors import DynloraError
from dynlora_cli.kernels.fused_lanes import Share, fused_lanes
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.models.linear import forget_input
from dynlora_cli.models.randomness import Randomness


class Rows(NamedTuple):
    """The rows of one run in a joint pass.

    Attributes:
        lane: number of the run.
        start, stop: lines of the batch.
        width: tokens of its longest row; what is behind them is padding for the sake of others.
        random: the run's random numbers, for dropout.
    """

    lane: int
    start: int
    stop: int
    width: int
    random: Randomness


class Places:
    """Whose rows are where, in the pass that is computed.

    Attributes:
        rows: of each run, in the order of the lines.
        width: T.
    """

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.width = 0


class LaneLinear(nn.Module):
    """A frozen linear layer plus, on the rows of each run, the update of that run.

    Args:
        name: of the layer, for messages.
        base: the frozen layer.
        layers: of the runs that adapt it, by number of the run. Their components and their classes are used; the base
            that they hold is the same.
        places: of the pass.
    """

    def __init__(self, name: str, base: nn.Module, layers: Mapping[int, ComponentLinear], places: Places) -> None:
        super().__init__()
        self.name, self.base, self.layers, self.places = name, base, dict(layers), places

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for model code that looks at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, for model code that looks at it."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O].

        Raises:
            DynloraError: the rows of x cannot be told apart by run.
        """
        rows, lines, width = self.places.rows, self.places.rows[-1].stop, self.places.width
        if x.shape[:-1] not in ((lines, width), (lines * width,)):
            raise DynloraError(
                f"{self.name} is given {tuple(x.shape)} of {lines} rows of {width} tokens: whose they are is not known",
                "train the recipes one after the other",
            )
        here = [(one, layer) for one in rows if (layer := self.layers.get(one.lane)) is not None and layer.count]
        if all(layer.fusable(x) and type(layer).finished is ComponentLinear.finished for _, layer in here):
            shares = [
                Share(slice(one.start * width, one.stop * width), layer.factors(), self._low(layer, x), layer.scale)
                for one, layer in here
            ]
            return self._watched(fused_lanes(x, self.base, shares), here) if shares else self.base(x)
        y = forget_input(self.base, self.base(x))
        return self._beside(x.reshape(lines, width, -1), y.reshape(lines, width, -1)).view(y.shape)

    @staticmethod
    def _low(layer: ComponentLinear, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return layer.low if torch.is_autocast_enabled(x.device.type) else None

    @staticmethod
    def _watched(y: Tensor, here: list[tuple[Rows, ComponentLinear]]) -> Tensor:
        for _, layer in here:
            layer.watched(y)
        return y

    def _beside(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """The output by ordinary operations, run after run, on the tokens that a run would have alone. [B, T, O]"""
        rows, width = self.places.rows, self.places.width
        sizes, found = [one.stop - one.start for one in rows], []
        for one, x, y in zip(rows, x_BTI.split(sizes), y_BTO.split(sizes), strict=True):
            layer = self.layers.get(one.lane)
            if layer is not None and layer.count:
                own, padding = y.split([one.width, width - one.width], 1)
                with one.random.exchanged() if layer.dropout else nullcontext():
                    own = layer.beside(x[:, : one.width], own, *layer.factors())
                y = torch.cat([own, padding], 1) if one.width < width else own
            found.append(y)
        return torch.cat(found)
