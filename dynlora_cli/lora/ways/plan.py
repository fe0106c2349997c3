"""How a layer computes the mixes of a batch, see lora/multi.py.

Where all requests have one mix it is a plain LoRA. Else there are three ways to the same numbers:

    mask        one product with all components that any request uses, and G. A request's own components are a part of
                them, so much is computed for nothing; but there is nothing to prepare.
    stack       the components of each request, padded to the largest rank, as one batched product. They are copied once
                for a batch, so it pays where many tokens follow, as in decoding.
    segments    a product for each run of requests with one mix, with its components alone: no copies and no padding,
                but calls of torch for each run. For long texts.

`Plan.way` chooses by the sizes; scripts/bench/NOTES.md has the times.

Dimensions, as suffixes of names:
    B  requests of a batch              E  adapters of a bank
    N  rows of tokens                   R  components that any request uses, or those of one request
    I  inputs of the layer (d_in)       O  outputs of the layer (d_out)
    G  groups of as many requests each, of one mix
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.kernels.fused_lora import thin_product
from dynlora_cli.lora.ways.mixes import Mixes
from dynlora_cli.models.linear import fusable, is_plain

# What a call of torch and of BLAS costs beside its sums, as multiplications that take as long: on a CPU for each
# thread, measured by scripts/bench/serving/mixed_batch.py --ways; for a GPU a guess from launch times.
CALL_CPU, CALL_GPU = 2**18, 2**26
# Numbers that a layer may copy for a stack, beside twice as many as the components that are used have.
COPIED = 2**16

Place = tuple[int, int]  # components of a layer: from, to
Way = Literal["mask", "stack", "segments"]
Adder: TypeAlias = Callable[[Tensor, Tensor], object]
THIN = 16  # rows from which `thin_product` is better than a batched product


class Held(Protocol):
    """What a plan asks of its layer, a `MultiLinear`."""

    base: nn.Module
    name: str
    a_RI: Tensor
    b_OR: Tensor
    columns_R: Tensor
    in_features: int
    out_features: int

    @property
    def device(self) -> torch.device: ...

    def places(self) -> list[tuple[int, Place]]: ...


class Piece(NamedTuple):
    """Components that a run of requests uses with one weight: a [R, I] and b [R, O]."""

    a_RI: Tensor
    b_RO: Tensor
    weight: float


class Segment(NamedTuple):
    """A run of requests that uses something of a layer, and what."""

    start: int
    stop: int
    pieces: list[Piece]


class Layout:
    """What a plan knows that all layers share whose adapters have the same ranks there.

    Attributes:
        taken: the components that any request uses, perhaps with a few between them.
        weight, gates: see `Plan`.
        ranks: components that each run uses.
    """

    def __init__(self, layer: Held, mixes: Mixes) -> None:
        self.places, self.mixes, self.device = dict(layer.places()), mixes, layer.device
        self.dtype = layer.a_RI.dtype
        self.taken = _spanned(_joined([place for column, place in self.places.items() if column in mixes.used]))
        taken = [c for c, (start, _) in self.places.items() if any(a <= start < b for a, b in self.taken)]
        self.gates: Tensor | None = None
        self.weight = 1.0
        among = {mixes.runs[0].weights.get(column, 0.0) for column in taken}
        if mixes.one and len(among) == 1 and not mixes.trained:
            (self.weight,) = among
        else:
            weights_BE = mixes.on(self.device)[:1] if mixes.one else mixes.on(self.device)
            self.gates = weights_BE.index_select(1, _rows(layer.columns_R, self.taken)).to(self.dtype)
        ranks = {column: stop - start for column, (start, stop) in self.places.items()}
        self.ranks = [sum(ranks.get(column, 0) for column in run.weights) for run in mixes.runs]

    @cached_property
    def stacked(self) -> tuple[int | None, Tensor, Tensor]:
        """The components of each group, [G, R], padded to one rank, and their weights, [G, R, 1].

        First comes the number of the first, if all stand one behind the other in the layer, each with weight 1.
        """
        rank = max(self.ranks)
        index_GR, weights_GR = [], []
        for weights in self.mixes.groups:
            asked = [(n, w) for c, w in weights.items() if c in self.places for n in range(*self.places[c])]
            asked += [(0, 0.0)] * (rank - len(asked))
            index_GR.append([number for number, _ in asked])
            weights_GR.append([weight for _, weight in asked])
        index, factors = torch.tensor(index_GR), torch.tensor(weights_GR, dtype=self.dtype)
        start = int(index[0, 0])
        in_order = torch.equal(index.flatten(), torch.arange(start, start + index.numel())) and bool(
            (factors == 1).all()
        )
        return start if in_order else None, index.to(self.device), factors[:, :, None].to(self.device)


class Plan:
    """What one layer computes for the mixes of a batch.

    Args:
        layer: whose components some request uses.
        mixes: of the batch.

    Attributes:
        requests: B.
        a_RI, b_RO: the components that any request uses.
        weight: of all of them in all requests, where `gates` is None.
        gates: of them, [B, R], or [1, R] where all requests have one mix.
        one_mix: whether they have.
    """

    def __init__(self, layer: Held, mixes: Mixes) -> None:
        self.layer, self.mixes, self._base = layer, mixes, layer.base
        self.requests = len(mixes.weights_BE)
        self.one_mix = mixes.one
        # What the base returns is nobody else's then, and may be added to.
        self._plain = is_plain(layer.base) and fusable(layer.base) and layer.base.weight.dtype == layer.a_RI.dtype
        self._bare = type(layer.base) is nn.Linear and "forward" not in vars(layer.base)
        key = layer.device, layer.a_RI.dtype, *layer.places()
        if key not in mixes.layouts:
            mixes.layouts[key] = Layout(layer, mixes)
        self.layout = mixes.layouts[key]
        self.gates, self.weight = self.layout.gates, self.layout.weight
        self.a_RI, self.b_RO = _rows(layer.a_RI, self.layout.taken), _rows(layer.b_OR.T, self.layout.taken)
        self._ways: dict[int, Way] = {}
        self._adding: dict[torch.Size, Adder] = {}

    def way(self, tokens: int) -> Way:
        """The fastest way for so many tokens of each request."""
        if self.one_mix or self.mixes.trained:
            return "mask"
        if tokens not in self._ways:
            costs = self._costs(tokens)
            self._ways[tokens] = min(costs, key=lambda way: costs[way])
        return self._ways[tokens]

    def _costs(self, tokens: int) -> dict[Way, float]:
        """Multiplications of each way, and its calls in multiplications that take as long."""
        layer = self.layer
        call = CALL_GPU if layer.device.type == "cuda" else CALL_CPU * torch.get_num_threads()
        width = layer.in_features + layer.out_features
        costs: dict[Way, float] = {"mask": self.requests * tokens * len(self.a_RI) * width + call}
        if tokens > 1 and costs["mask"] < 2 * call:
            return costs
        rank = max(self.layout.ranks)
        if len(self.mixes.groups) * rank * width <= max(COPIED, 2 * self.a_RI.numel() + 2 * self.b_RO.numel()):
            costs["stack"] = self.requests * tokens * rank * width + call
        sums = sum(rank * (run.stop - run.start) for rank, run in zip(self.layout.ranks, self.mixes.runs, strict=True))
        costs["segments"] = sums * tokens * width + 2 * call * len(self.mixes.runs)
        return costs

    @cached_property
    def segments(self) -> list[Segment]:
        """The runs that use anything of the layer. Their components are views."""
        places, layer = dict(self.layer.places()), self.layer
        found = []
        for run in self.mixes.runs:
            asked = sorted((places[column], weight) for column, weight in run.weights.items() if column in places)
            pieces = [
                Piece(layer.a_RI[start:stop], layer.b_OR.T[start:stop], weight)
                for weight, group in groupby(asked, key=lambda entry: entry[1])
                for start, stop in _joined([place for place, _ in group])
            ]
            if pieces:
                found.append(Segment(run.start, run.stop, pieces))
        return found

    @cached_property
    def stack(self) -> tuple[Tensor, Tensor]:
        """Of each group a [G, R, I] and b [G, R, O] with its weights; views where they can be, else copies."""
        with torch.inference_mode(False):  # they may be used with gradients later
            start, index_GR, weights_GR1 = self.layout.stacked
            a_RI, b_RO = self.layer.a_RI, self.layer.b_OR.T
            if start is None:
                return a_RI[index_GR], b_RO[index_GR].mul_(weights_GR1)
        stop = start + index_GR.numel()
        return a_RI[start:stop].unflatten(0, index_GR.shape), b_RO[start:stop].unflatten(0, index_GR.shape)

    def tokens(self, x: Tensor) -> int:
        """Rows of tokens of each request in x, whose requests follow one another.

        Raises:
            ValueError: x cannot be told apart by request.
        """
        if self.one_mix:
            return 1
        rows = math.prod(x.shape[:-1])
        if (x.shape[0] if x.ndim > 2 else rows) % self.requests:
            raise ValueError(
                f"{self.layer.name} is given {tuple(x.shape)}, which are no rows of {self.requests} requests"
            )
        return rows // self.requests

    def in_place(self, x: Tensor) -> bool:
        """Whether the components' share can be added to what the base makes of x, by `product` and `add_to`."""
        base = self._base
        return (
            self._plain
            and x.dtype == self.a_RI.dtype
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
            and not (base._forward_hooks or base._forward_pre_hooks)
        )

    def product(self, x: Tensor) -> Tensor:
        """What the base makes of x. Calling a module costs as much as a small product, and there are no hooks here."""
        if self._bare:
            own = self._base._parameters
            return F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        product: Tensor = self._base(x)
        return product

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add what the components make of x [..., I] to y [..., O], in place."""
        add = self._adding.get(x.shape)
        if add is None:
            add = self._adding[x.shape] = self._adder(x)
        add(y, x)

    def _adder(self, x: Tensor) -> Adder:
        """`add_to` for inputs of one shape, with as few calls as there can be: a token costs more calls than sums."""
        tokens, d_in, d_out = self.tokens(x), x.shape[-1], self.b_RO.shape[1]
        way = self.way(tokens)
        if way == "segments":
            return self._add_segments(tokens)
        if way == "stack" or (self.gates is None and x.ndim == 3 and len(x) == 1 and x.shape[1] < THIN):
            a_GRI, b_GRO = self.stack if way == "stack" else (self.a_RI[None], self.b_RO[None])
            groups, weight, a_GIR = len(a_GRI), self.weight, a_GRI.transpose(1, 2)
            if x.ndim == 3 and len(x) == groups:
                return lambda y, x: y.baddbmm_(torch.bmm(x, a_GIR), b_GRO, alpha=weight)
            return lambda y, x: y.view(groups, -1, d_out).baddbmm_(torch.bmm(x.reshape(groups, -1, d_in), a_GIR), b_GRO)

        def add(y: Tensor, x: Tensor) -> object:
            h_NR = self._gated(thin_product(x.reshape(-1, d_in), self.a_RI), tokens)
            return y.view(-1, d_out).addmm_(h_NR, self.b_RO, alpha=self.weight)

        return add

    def _add_segments(self, tokens: int) -> Adder:
        parts = [(slice(run.start * tokens, run.stop * tokens), run.pieces) for run in self.segments]

        def add(y: Tensor, x: Tensor) -> None:
            x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for rows, pieces in parts:
                for a_RI, b_RO, weight in pieces:
                    y_NO[rows].addmm_(thin_product(x_NI[rows], a_RI), b_RO, alpha=weight)

        return add

    def update(self, x_NI: Tensor, tokens: int) -> Tensor:
        """What the components make of x, [N, O]; differentiable."""
        way = self.way(tokens)
        if way == "mask":
            h_NR = self._gated(thin_product(x_NI, self.a_RI), tokens)
            return (h_NR if self.weight == 1 else h_NR * self.weight) @ self.b_RO
        if way == "stack":
            a_GRI, b_GRO = self.stack
            h = torch.bmm(x_NI.reshape(len(a_GRI), -1, x_NI.shape[1]), a_GRI.transpose(1, 2))
            return torch.bmm(h, b_GRO).view(len(x_NI), -1)
        parts, end = [], 0
        for run in self.segments:
            parts.append(x_NI.new_zeros((run.start - end) * tokens, self.b_RO.shape[1]))
            x, end = x_NI[run.start * tokens : run.stop * tokens], run.stop
            products = [((x @ a_RI.T) * weight) @ b_RO for a_RI, b_RO, weight in run.pieces]
            parts.append(torch.stack(products).sum(0) if len(products) > 1 else products[0])
        parts.append(x_NI.new_zeros((self.requests - end) * tokens, self.b_RO.shape[1]))
        return torch.cat(parts)

    def _gated(self, h_NR: Tensor, tokens: int) -> Tensor:
        gates = self.gates
        if gates is None:
            return h_NR
        if tokens == 1 or len(gates) == 1:
            return h_NR * gates
        return (h_NR.view(self.requests, tokens, -1) * gates[:, None]).flatten(0, 1)


def _joined(places: Iterable[Place]) -> list[Place]:
    """The same, with those that touch as one."""
    found: list[Place] = []
    for start, stop in places:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return found


def _spanned(places: list[Place]) -> list[Place]:
    """One place from the first to the last, if little lies between: a view needs no memory."""
    span = places[0][0], places[-1][1]
    return [span] if sum(stop - start for start, stop in places) >= 0.75 * (span[1] - span[0]) else places


def _rows(tensor: Tensor, places: list[Place]) -> Tensor:
    parts = [tensor[start:stop] for start, stop in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
