"""VeRA: all layers share one pair of frozen random matrices; only two vectors of each layer are trained.

What it does
    ΔW = diag(b) B diag(d) A with A and B random, the same for all layers and cut to each layer's shape; d is 0.1 and b
    is 0 at the start. A component is one entry of d, so a rank of 128 is an average of 128 entries, and pruning removes
    entries. b has one number per output and is not counted in the budget, as magnitudes are not. There is no s.

When to use it
    Where the trained numbers must be very few: with `rank.budget: 128` or so, and a learning rate ten times LoRA's or
    more. It takes the time and memory of a LoRA of its rank.

Reference
    VeRA, arXiv 2310.11454, equation 2. A and B are those of PEFT for `projection_prng_key` = the recipe's seed. Saved
    in PEFT's own form, with zeros for the entries of d that are gone, and with A and B, which are most of the file:
    4 r (max d_in + max d_out) bytes, 29 MB for r = 256 and matrices of 14336 x 14336.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.adapters.adapter import ONLY_LORA, PREFIX
from dynlora_cli.lora.layer import ComponentLinear, linear_shape
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.variant import put
from dynlora_cli.pruning.control import Start

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe

has_components = True
takes = ("dropout",)
D_INITIAL = 0.1


class Layer(ComponentLinear):
    """A frozen linear layer plus diag(b) B diag(d) A. a_CI holds d, as [C, 1]; b_OC nothing.

    Args:
        base: the frozen layer.
        dropout: probability of dropping an input of the update while training.
        pair: A [R, inputs of the widest layer] and B [outputs of the widest layer, R], shared by all layers.
        seed: that A and B were drawn with.
    """

    turns = plain = False

    def __init__(self, base: nn.Module, dropout: float, pair: tuple[Tensor, Tensor], seed: int) -> None:
        super().__init__(base, 1.0, dropout)
        self.pair, self.seed = pair, seed
        self.lambda_b_O = nn.Parameter(torch.zeros(self.out_features, device=pair[0].device))
        self._of: Tensor | None = None

    @staticmethod
    def widths(d_in: int, d_out: int) -> tuple[int, int]:  # noqa: ARG004
        return 1, 0

    @staticmethod
    def most(d_in: int, d_out: int) -> int:  # noqa: ARG004
        return 1024  # above what the paper uses; components may be more than the layer is wide

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:  # noqa: ARG002
        a_CI.fill_(D_INITIAL)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self._of is not self.survivors_C:
            self._A_CI, self._B_OC = self._projections()
            self._of = self.survivors_C
        return self.a_CI * self._A_CI, self.lambda_b_O[:, None] * self._B_OC

    def _projections(self) -> tuple[Tensor, Tensor]:
        """A and B of the components that are left."""
        A_CI, B_OC = self.pair[0][:, : self.in_features], self.pair[1][: self.out_features]
        if self.count < len(A_CI):  # else views do, which take no memory
            kept_C = self.survivors_C.to(A_CI.device)
            A_CI, B_OC = A_CI[kept_C], B_OC[:, kept_C]
        return A_CI.to(self.a_CI.dtype), B_OC.to(self.a_CI.dtype)


def projections(rank: int, d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, d_in] and B [d_out, rank]: kaiming_uniform, drawn in this order, as PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return kaiming(rank, d_in), kaiming(d_out, rank)


def attach(model: nn.Module, targets: Mapping[str, nn.Module], start: Start, recipe: Recipe) -> Pool:
    """Replace every target by a layer that holds it."""
    shapes = [linear_shape(target) for target in targets.values()]
    widest = max(d_in for d_in, _ in shapes), max(d_out for _, d_out in shapes)
    device = next(model.parameters()).device
    a, b = (each.to(device) for each in projections(max(start.counts.values()), *widest, recipe.seed))

    def layer(base: nn.Module, scale: float, dropout: float) -> Layer:  # noqa: ARG001 - b and d are the scale
        return Layer(base, dropout, (a, b), recipe.seed)

    return put(model, targets, start, recipe, layer)


def saved(pool: Pool, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's own form; layers without an entry are not listed, and A and B are as wide as those that are."""
    layers = {name: layer for name, layer in pool.layers.items() if layer.count and isinstance(layer, Layer)}
    first = next(iter(layers.values()))
    tensors = {
        "base_model.vera_A": first.pair[0][:, : max(layer.in_features for layer in layers.values())],
        "base_model.vera_B": first.pair[1][: max(layer.out_features for layer in layers.values())],
    }
    rank = len(first.pair[0])
    for name, layer in layers.items():
        d_R = torch.zeros(rank)
        d_R[layer.survivors_C] = layer.a_CI.detach().cpu().flatten()
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = d_R
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = layer.lambda_b_O.detach()
    written = {key: value for key, value in config.items() if key not in ONLY_LORA} | {
        "peft_type": "VERA",
        "bias": "none",
        "r": rank,
        "d_initial": D_INITIAL,
        "init_weights": True,
        "projection_prng_key": first.seed,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    return written, tensors
