"""The trace of a training pass through the blocks of a model, and how `cuda_graphs` replays it.

Listening   traces one pass: the blocks run as usual, and what each is given and returns is noted as a `Call`
Stretch     consecutive blocks, each fed by the output of the one before it; captured as one function of tensors
Playing     replays one pass: the first block of a stretch replays its capture, the others return the result
StandIn     takes the place of a block during a traced or replayed pass

A CUDA graph takes tensors and returns tensors, while blocks take and return nested tuples and dictionaries. A trace
therefore flattens arguments and results into lists of leaves (torch's pytree) and notes for each leaf where it came
from: HANDED (the output of the block before), Outside(n) (the n-th tensor that entered the blocks from elsewhere, such
as the embedding or the mask), or the constant itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dynlora_cli.errors import DynloraError
from dynlora_cli.lora.layer import ComponentLinear

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)

Play = Callable[..., tuple[Tensor, ...]]


class Handed:
    """Marks a leaf of a trace that is a block's own output: returned by one block and given to the next."""


@dataclass(frozen=True)
class Outside:
    """Marks a leaf of a trace that is a tensor from outside the blocks, numbered in order of first appearance."""

    number: int


HANDED = Handed()


@dataclass
class Call:
    """One call of one block, as traced: the marks of its arguments and of what it returned, with their nesting.

    A mark is HANDED, an `Outside`, or a constant. Among the returned leaves, HANDED marks the tensors that the block
    computed; an argument that it merely returned again has the mark of the argument.
    """

    block: nn.Module
    given: list[Any]
    given_spec: TreeSpec
    returned: list[Any]
    returned_spec: TreeSpec

    @property
    def hands_on(self) -> bool:
        """Whether the block computed exactly one tensor: only then is it clear what the next one is fed."""
        return sum(leaf is HANDED for leaf in self.returned) == 1

    def made(self, result: Any) -> list[Tensor]:
        """The tensors that the block computed, picked out of what it returned."""
        return [leaf for leaf, mark in zip(tree_leaves(result), self.returned, strict=True) if mark is HANDED]

    def result(self, made: Iterable[Tensor], outside: list[Tensor]) -> Any:
        """What the block would return if it had computed the tensors `made`, in its own nesting."""
        rest = iter(made)
        leaves = [next(rest) if leaf is HANDED else _filled(leaf, outside) for leaf in self.returned]
        return tree_unflatten(leaves, self.returned_spec)


@dataclass
class Stretch:
    """Consecutive blocks that are captured as one function of tensors.

    Its arguments are the tensors from outside, then those that train: make_graphed_callables computes gradients only
    for what it is given as an argument.
    """

    calls: list[Call] = field(default_factory=list)
    layers: list[ComponentLinear] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)
    play: Play | None = None

    @cached_property  # needed in every pass; first asked for when all calls have been added
    def numbers(self) -> list[int]:
        """The numbers of the tensors from outside that this stretch reads, in order."""
        return sorted({leaf.number for call in self.calls for leaf in call.given if isinstance(leaf, Outside)})

    def add(self, call: Call) -> None:
        self.calls.append(call)
        layers = {part: None for part in call.block.modules() if isinstance(part, ComponentLinear)}
        self.layers += [layer for layer in layers if layer not in self.layers]
        known = {id(leaf) for leaf in self.leaves}
        self.leaves += [leaf for leaf in call.block.parameters() if leaf.requires_grad and id(leaf) not in known]

    def trained(self) -> list[Tensor]:
        """The tensors that train in this stretch.

        Usually the leaves. Where the cast copies in `layer.low` take the gradients instead (compiled blocks, see
        `Pool.cast_with`), they come first, and a_CI and b_OC of those layers are left out.
        """
        copies = [half for layer in self.layers for half in layer.low or () if half.requires_grad]
        if not copies:
            return list(self.leaves)
        replaced = {id(leaf) for layer in self.layers for leaf in (layer.a_CI, layer.b_OC)}
        return [*copies, *(leaf for leaf in self.leaves if id(leaf) not in replaced)]

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the blocks on these arguments: the function that is captured.

        Args:
            tensors: those from outside, in the order of `numbers`; then those of `trained`.
        """
        rest = iter(tensors)
        outside = {number: next(rest) for number in self.numbers}
        for layer in self.layers:
            if layer.low and layer.low[1].requires_grad:
                a_CI, b_OC = (next(rest) if half.requires_grad else half for half in layer.low)
                layer.__dict__["low"] = a_CI, b_OC
        made: list[Tensor] = []
        for call in self.calls:
            leaves = [made[0] if leaf is HANDED else _filled(leaf, outside) for leaf in call.given]
            args, kwargs = tree_unflatten(leaves, call.given_spec)
            made = call.made(call.block(*args, **kwargs))
        return tuple(made)


def _filled(leaf: Any, outside: Any) -> Any:
    return outside[leaf.number] if isinstance(leaf, Outside) else leaf


class StandIn(nn.Module):
    """Takes the place of a block for one pass: calls go to `call`, attributes are read from the block."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(block=block, call=call)  # past nn.Module, which would register the block as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.block, *args, **kwargs)


class Listening:
    """Traces one pass: called instead of every block, it runs the block and notes what goes in and out.

    Attributes:
        key: of the batch's shape.
        stretches: found so far.
        outside: the tensors from outside, by number.
        strange: why this model cannot be captured, or None.
    """

    def __init__(self, key: Any) -> None:
        self.key = key
        self.stretches: list[Stretch] = []
        self.outside: list[Tensor] = []
        self.strange: str | None = None
        self._handed: Tensor | None = None
        self._pattern: Any = None

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given, given_spec = tree_flatten((args, kwargs))
        result = block(*args, **kwargs)
        returned, returned_spec = tree_flatten(result)
        for leaf in (*given, *returned):
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                self.strange = f"its blocks are given or return a {type(leaf).__name__}"
        follows = self._handed is not None and any(leaf is self._handed for leaf in given)
        # A stretch ends where the pattern of the arguments changes or a new tensor comes in. A mask may be a tensor in
        # one pass and None in another, and a replay can only notice that at the first block of a stretch: from there it
        # can still run the blocks as usual, in the middle it cannot.
        pattern = given_spec, [isinstance(leaf, Tensor) for leaf in given]
        begins = not follows or pattern != self._pattern or any(map(self._new, given))
        if begins:
            self.stretches.append(Stretch())
        self._pattern = pattern
        # In the first block of a stretch even the output of the block before counts as a tensor from outside.
        noted = [self._noted(leaf, begins=begins) for leaf in given]
        known = {id(leaf): mark for leaf, mark in zip(given, noted, strict=True) if isinstance(mark, Outside)}
        marks = [known.get(id(leaf), HANDED) if isinstance(leaf, Tensor) else leaf for leaf in returned]
        call = Call(block, noted, given_spec, marks, returned_spec)
        made = call.made(result)
        if not made:
            self.strange = "its blocks return no tensor of their own"
        self.stretches[-1].add(call)
        self._handed = made[0] if call.hands_on else None
        return result

    def _new(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf is not self._handed and self._number(leaf) is None

    def _number(self, leaf: Tensor) -> int | None:
        return next((number for number, tensor in enumerate(self.outside) if tensor is leaf), None)

    def _noted(self, leaf: Any, *, begins: bool) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf is self._handed and not begins:
            return HANDED
        number = self._number(leaf)
        if number is None:
            number = len(self.outside)
            self.outside.append(leaf)
        return Outside(number)

    def let_go(self) -> None:
        """Detach what is kept, so that the autograd graph of the traced pass can be freed."""
        self._handed = None
        self.outside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.outside]

    @property
    def kinds(self) -> list[Any]:
        return [kind_of(tensor) for tensor in self.outside]

    @property
    def blocks(self) -> list[nn.Module]:
        return [call.block for stretch in self.stretches for call in stretch.calls]


class Playing:
    """Replays one pass: called instead of every block.

    Every call is compared with the trace. If the first block of a stretch is given something else than in the trace
    (another shape, a mask where there was none), this and all later blocks run as usual (`usual`). Within a stretch
    that is an error: its result has been handed out already.

    Before there is a capture (`BlockGraphs._sound`), the first block of a stretch runs all of its blocks.
    """

    def __init__(self, stretches: list[Stretch], kinds: list[Any]) -> None:
        self.kinds = kinds
        self.outside: list[Tensor] = []
        self.usual = False
        self._results: tuple[Tensor, ...] = ()
        self._calls = [(stretch, place, call) for stretch in stretches for place, call in enumerate(stretch.calls)]
        self._at = 0

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.usual:
            return block(*args, **kwargs)
        if self._at == len(self._calls):
            raise unlike("the model ran more blocks than when they were recorded")
        stretch, place, call = self._calls[self._at]
        given, spec = tree_flatten((args, kwargs))
        if call.block is not block or not self._as_recorded(given, spec, call):
            if place:
                raise unlike("the blocks were given other inputs than when they were recorded")
            self.usual = True
            return block(*args, **kwargs)
        if place == 0:  # replay the whole stretch now; its other blocks return this result
            play = stretch.play or stretch.run
            self._results = play(*(self.outside[number] for number in stretch.numbers), *stretch.trained())
            if stretch.layers:
                stretch.layers[0].watched(self._results[0])
        self._at += 1
        # Only the last block of a stretch may compute more than one tensor: see `Call.hands_on`.
        return call.result(self._results if call is stretch.calls[-1] else self._results[:1], self.outside)

    def _as_recorded(self, given: list[Any], spec: TreeSpec, call: Call) -> bool:
        """Whether the arguments match the trace. Tensors from outside get their number when they first appear."""
        if spec != call.given_spec:
            return False
        for leaf, known in zip(given, call.given, strict=True):
            if known is HANDED:
                same = leaf is self._results[0]
            elif isinstance(known, Outside):
                if known.number == len(self.outside) and isinstance(leaf, Tensor):
                    self.outside.append(leaf)
                    same = kind_of(leaf) == self.kinds[known.number]
                else:
                    same = known.number < len(self.outside) and leaf is self.outside[known.number]
            else:
                same = type(leaf) is type(known) and leaf == known
            if not same:
                return False
        return True

    def finish(self) -> None:
        """Check at the end of the pass that all blocks were called.

        Raises:
            DynloraError: some were not, so the pass contains work of blocks that the model wanted to leave out.
        """
        if not self.usual and self._at < len(self._calls):
            raise unlike("the model left out blocks that it ran when they were recorded")


def unlike(what: str) -> DynloraError:
    """The error of a pass that began like the trace and then differed from it."""
    return DynloraError(f"train.cuda_graphs: {what}", "set train.cuda_graphs: false, and please report this")


def kind_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """What has to agree for a tensor to be copied into a capture's input buffer."""
    return tensor.shape, tensor.dtype
