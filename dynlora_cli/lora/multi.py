"""A frozen layer with the components of several adapters side by side, each row of a batch with its own mix of them.

y = W x + ((x Aᵀ) * G) Bᵀ          G is rows x components: what each row takes of each component

A and B hold the components of all adapters, whatever the rank of each, so one sum is every mix: an adapter, the base
alone, a blend, the gates of a router. There is never a tensor of tokens x adapters x outputs, and components that no
row of the batch uses are left out. Where every row has a mix of its own there are two ways to the same numbers:

    mask        one product with all components that any row uses, and G
    segments    a product for each run of requests with one mix, with its components alone

Segments compute less and mask calls less. Which is faster depends on the sizes, see `Plan.in_segments`.

Dimensions, as suffixes of names:
    B  requests of a batch              E  adapters of a bank; E' those that have components in the layer
    N  rows of tokens                   R  components: of the layer, all adapters together, or of a part of them
    I  inputs of the layer (d_in)       O  outputs of the layer (d_out)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dynlora_cli.kernels.fused_lora import thin_product
from dynlora_cli.models.linear import forget_input, fusable, is_plain, linear_shape

# What a run of requests costs beside its sums, as multiplications that take as long: calls of torch and of BLAS. On a
# CPU it is for each thread, measured by scripts/bench/serving/ways.py; of a GPU it is a guess from launch times.
CALL_CPU, CALL_GPU = 2**19, 2**27

Place = tuple[int, int]  # components of a layer: from, to


class TokenGates(Protocol):
    """A router that weighs the adapters anew for each token, in each layer."""

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """What each token takes of the layer's adapters, or of each component.

        Args:
            layer: its `adapters` and `slices` say whose components the columns of h are.
            x_NI: the layer's input, in the type that components compute in.
            h_NR: x Aᵀ.

        Returns:
            [N, E'], columns in the order of `layer.adapters`, or [N, R].
        """
        ...


class Choice:
    """What the next forward passes use of a bank's adapters. All layers of a bank share one.

    Attributes:
        gates: weighs the adapters by token; `weights_BE` is not used then.
        mixes: made of `weights_BE`.
    """

    def __init__(self) -> None:
        self.gates: TokenGates | None = None
        self.mixes: Mixes | None = None

    @property
    def weights_BE(self) -> Tensor | None:
        """What each request takes of each adapter of the bank. None: the base alone."""
        return None if self.mixes is None else self.mixes.weights_BE

    @weights_BE.setter
    def weights_BE(self, weights_BE: Tensor | None) -> None:
        self.mixes = None if weights_BE is None else Mixes(weights_BE)


class Run(NamedTuple):
    """Requests of one mix that follow one another: which, and the weights that are not 0, by column of the bank."""

    start: int
    stop: int
    weights: dict[int, float]


class Mixes:
    """The mixes of a batch, sorted out once for all layers and all forward passes.

    Attributes:
        runs: of all requests, in their order.
        used: columns of the bank that any request uses.
        plans: what each layer made of it when it first came by.
    """

    def __init__(self, weights_BE: Tensor) -> None:
        self.weights_BE = weights_BE
        self.trained = weights_BE.requires_grad
        self.runs: list[Run] = []
        for row, line in enumerate(weights_BE.tolist()):
            weights = {column: weight for column, weight in enumerate(line) if weight}
            if self.runs and self.runs[-1].weights == weights:
                self.runs[-1] = self.runs[-1]._replace(stop=row + 1)
            else:
                self.runs.append(Run(row, row + 1, weights))
        # A weight of 0 has a gradient, too.
        columns = range(weights_BE.shape[1]) if self.trained else (c for run in self.runs for c in run.weights)
        self.used = set(columns)
        self.plans: dict[MultiLinear, Plan | None] = {}
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The weights on a device, in fp32 at least. [B, E]"""
        if device not in self._on:
            self._on[device] = self.weights_BE.to(device)
        return self._on[device]


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


class Plan:
    """What one layer computes for the mixes of a batch, of which it is asked for something.

    Attributes:
        requests: B.
        a_RI, b_RO: the components that any request uses.
        weight: of all of them in all requests, where `gates` is None.
        gates: of them, [B, R], or [1, R] where all requests have one mix.
        one_mix: whether they have, so that it does not matter whose the rows are.
        in_place: whether what the base returns is nobody else's, and may be added to.
    """

    def __init__(self, layer: MultiLinear, mixes: Mixes) -> None:
        self.layer, self.mixes = layer, mixes
        self.requests = len(mixes.weights_BE)
        self.one_mix = self.requests == 1 or (len(mixes.runs) == 1 and not mixes.trained)
        self.in_place = fusable(layer.base) and is_plain(layer.base)
        wanted = [place for column, place in layer.places() if column in mixes.used]
        taken = _spanned(_joined(wanted))
        self.a_RI, self.b_RO = _rows(layer.a_RI, taken), _rows(layer.b_OR.T, taken)
        columns_R = _rows(layer.columns_R, taken)
        self.gates: Tensor | None = None
        self.weight = 1.0
        weights = mixes.runs[0].weights
        among = {weights.get(c, 0.0) for c, (start, stop) in layer.places() if any(a <= start < b for a, b in taken)}
        if self.one_mix and len(among) == 1 and not mixes.trained:
            (self.weight,) = among
        else:
            weights_BE = mixes.on(layer.device)
            self.gates = (weights_BE[:1] if self.one_mix else weights_BE).index_select(1, columns_R).to(self.a_RI.dtype)
        self._cost = self.requests * len(self.a_RI) * (layer.in_features + layer.out_features)  # of a token each
        self._call = CALL_GPU if layer.device.type == "cuda" else CALL_CPU * torch.get_num_threads()

    def in_segments(self, tokens: int) -> bool:
        """Whether that is faster than the mask, for so many tokens of each request."""
        if self.one_mix or self.mixes.trained or tokens * self._cost < self._call * len(self.mixes.runs):
            return False
        return tokens > self._segments_from

    @cached_property
    def _segments_from(self) -> float:
        """Tokens of a request from which segments save more sums than their calls cost."""
        width = self.layer.in_features + self.layer.out_features
        sums = sum(len(piece.a_RI) * (run.stop - run.start) for run in self.segments for piece in run.pieces) * width
        calls = self._call * sum(len(run.pieces) for run in self.segments)
        return calls / (self._cost - sums) if sums < self._cost else math.inf

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

    def add_to(self, y_NO: Tensor, x_NI: Tensor, tokens: int) -> None:
        """Add what the components make of x to y, in place."""
        if self.in_segments(tokens):
            for run in self.segments:
                rows = slice(run.start * tokens, run.stop * tokens)
                x, y = x_NI[rows], y_NO[rows]
                for a_RI, b_RO, weight in run.pieces:
                    y.addmm_(thin_product(x, a_RI), b_RO, alpha=weight)
        else:
            y_NO.addmm_(self._gated(thin_product(x_NI, self.a_RI), tokens), self.b_RO, alpha=self.weight)

    def update(self, x_NI: Tensor, tokens: int) -> Tensor:
        """What the components make of x, [N, O]; differentiable."""
        if not self.in_segments(tokens):
            h_NR = self._gated(thin_product(x_NI, self.a_RI), tokens)
            return (h_NR if self.weight == 1 else h_NR * self.weight) @ self.b_RO
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


class MultiLinear(nn.Module):
    """A frozen linear layer plus the components of several adapters.

    Args:
        base: the frozen layer; maps [..., I] to [..., O].
        name: of the layer in the model.
        choice: says who uses which adapters.

    Attributes:
        a_RI, b_OR: the components, adapter after adapter, fp32; the scale is in B.
        adapters: the columns of the bank that have components here.
        slices: of R, one for each of `adapters`.
    """

    a_RI: Tensor
    b_OR: Tensor
    columns_R: Tensor  # whose a component is, as a column of the bank
    owners_R: Tensor  # the same as an index into `adapters`

    def __init__(self, base: nn.Module, name: str, choice: Choice) -> None:
        super().__init__()
        self.base, self.name, self.choice = base, name, choice
        self.in_features, self.out_features = linear_shape(base)
        self.adapters: list[int] = []
        self.slices: list[slice] = []
        self.hold([])

    def hold(self, parts: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Take these components in place of those before.

        Args:
            parts: the adapter's column in the bank, its a [C, I] and its b [O, C] with the scale in it.
        """
        parts, device = list(parts), self.device
        ends = [0, *accumulate(len(a_CI) for _, a_CI, _ in parts)]
        self.slices = [slice(*pair) for pair in pairwise(ends)]
        a = torch.empty(ends[-1], self.in_features, device=device)
        # In memory a component's b is one piece, like its a: then those of an adapter are, and products are faster.
        b = torch.empty(ends[-1], self.out_features, device=device)
        for place, (_, a_CI, b_OC) in zip(self.slices, parts, strict=True):
            a[place], b[place] = a_CI.detach(), b_OC.detach().T
        self.register_buffer("a_RI", a, persistent=False)
        self.register_buffer("b_OR", b.T, persistent=False)
        self.number([column for column, _, _ in parts])

    def number(self, adapters: Sequence[int]) -> None:
        """Say which columns of the bank the adapters are that have components here."""
        if self.choice.mixes is not None:
            self.choice.mixes.plans.pop(self, None)
        self.adapters = list(adapters)
        # Made in Python: a dry run, whose tensors have no numbers, comes here as well.
        owners = [owner for owner, place in enumerate(self.slices) for _ in range(place.start, place.stop)]
        owners_R = torch.tensor(owners, dtype=torch.long)
        self.owners_R = owners_R.to(self.device)
        self.columns_R = torch.tensor(self.adapters, dtype=torch.long)[owners_R].to(self.device)

    def places(self) -> list[tuple[int, Place]]:
        """The adapters that have components here, by column of the bank, and which components."""
        return [(column, (s.start, s.stop)) for column, s in zip(self.adapters, self.slices, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the base's weight lies."""
        return self.weight.device

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
            ValueError: the rows of x cannot be told apart by request.
        """
        y = self.base(x)
        if y.requires_grad:
            forget_input(self.base, y)
        choice = self.choice
        if choice.gates is not None:
            return self._routed(y, x, choice.gates) if self.adapters else y
        plan = self._plan(choice.mixes)
        if plan is None:
            return y
        tokens = plan.tokens(x)
        x_NI = self._input(x)
        owned = plan.in_place and not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        if owned and y.dtype == x_NI.dtype == plan.a_RI.dtype:
            plan.add_to(y.view(-1, y.shape[-1]), x_NI, tokens)
            return y
        return y + plan.update(x_NI, tokens).view(y.shape).to(y.dtype)

    def _plan(self, mixes: Mixes | None) -> Plan | None:
        """How to compute for these mixes; None where they use nothing of this layer."""
        if mixes is None:
            return None
        if self not in mixes.plans or mixes.trained:  # each graph has gates of its own
            with torch.inference_mode(False):  # it may be used with gradients later
                mixes.plans[self] = None if mixes.used.isdisjoint(self.adapters) else Plan(self, mixes)
        return mixes.plans[self]

    def _input(self, x: Tensor) -> Tensor:
        """The rows of x, [N, I], in the type that components compute in."""
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.a_RI.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_RI.dtype)
        return x.reshape(-1, x.shape[-1])

    def _routed(self, y: Tensor, x: Tensor, router: TokenGates) -> Tensor:
        x_NI = self._input(x)
        h_NR = thin_product(x_NI, self.a_RI)
        gates = router.gates(self, x_NI, h_NR)
        if gates.shape[-1] != len(self.a_RI):
            gates = gates.index_select(-1, self.owners_R)
        return y + ((h_NR * gates) @ self.b_OR.T).view(y.shape).to(y.dtype)


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
