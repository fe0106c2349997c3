"""What a training pass through the blocks of a model consists of, as `cuda_graphs` needs it.

Listening   a pass as usual, of which is noted what each block is given and what it returns
Stretch     blocks of which each is given what the one before it returned: recorded as one function of tensors
Playing     a pass in which the first block of a stretch plays the recording and the others hand on what they get
StandIn     in the place of a block in both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dynlora_cli.components import ComponentLinear
from dynlora_cli.errors import DynloraError

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)

Play = Callable[..., tuple[Tensor, ...]]


class Handed:
    """In the place of the tensor that one block returns and the next is given."""


@dataclass(frozen=True)
class Outside:
    """In the place of a tensor that blocks are given from elsewhere: its number in the pass."""

    number: int


HANDED = Handed()


@dataclass
class Call:
    """One block in one pass: the leaves of its arguments and of what it returned, each a constant where no tensor.

    Of what it returned, `HANDED` are the tensors it made; one that it had been given and gave back is what it was.
    """

    block: nn.Module
    given: list[Any]
    given_spec: TreeSpec
    returned: list[Any]
    returned_spec: TreeSpec

    @property
    def hands_on(self) -> bool:
        """Whether it made one tensor and no more."""
        return sum(leaf is HANDED for leaf in self.returned) == 1

    def made(self, result: Any) -> list[Tensor]:
        """The tensors that it made, out of what it returned."""
        return [leaf for leaf, mark in zip(tree_leaves(result), self.returned, strict=True) if mark is HANDED]

    def result(self, made: Iterable[Tensor], outside: list[Tensor]) -> Any:
        """What the block would return if it had made these tensors."""
        rest = iter(made)
        leaves = [next(rest) if leaf is HANDED else _filled(leaf, outside) for leaf in self.returned]
        return tree_unflatten(leaves, self.returned_spec)


@dataclass
class Stretch:
    """Blocks that are recorded as one function of tensors: what comes from outside, and what trains."""

    calls: list[Call] = field(default_factory=list)
    layers: list[ComponentLinear] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)
    play: Play | None = None

    @cached_property  # asked for in every pass, and not before all calls are there
    def numbers(self) -> list[int]:
        """Of the tensors that come from outside."""
        return sorted({leaf.number for call in self.calls for leaf in call.given if isinstance(leaf, Outside)})

    def add(self, call: Call) -> None:
        self.calls.append(call)
        layers = {part: None for part in call.block.modules() if isinstance(part, ComponentLinear)}
        self.layers += [layer for layer in layers if layer not in self.layers]
        known = {id(leaf) for leaf in self.leaves}
        self.leaves += [leaf for leaf in call.block.parameters() if leaf.requires_grad and id(leaf) not in known]

    def trained(self) -> list[Tensor]:
        """What trains in it: first the copies that hand gradients on to the pool, where there are such."""
        copies = [half for layer in self.layers for half in layer.low or () if half.requires_grad]
        if not copies:
            return list(self.leaves)
        replaced = {id(leaf) for layer in self.layers for leaf in (layer.a_CI, layer.b_OC)}
        return [*copies, *(leaf for leaf in self.leaves if id(leaf) not in replaced)]

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the blocks; to be recorded."""
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
    """In the place of a block for one pass; whatever else the model asks for, it is the block that answers."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(block=block, call=call)  # set the usual way, the block would become a part of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.block, *args, **kwargs)


class Listening:
    """A pass as usual, of which is noted what the blocks are given and return."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.stretches: list[Stretch] = []
        self.outside: list[Tensor] = []
        self.strange: str | None = None  # what no recording can hold
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
        # What is a tensor in one pass may be None in another, a mask: that has to show before anything is played.
        pattern = given_spec, [isinstance(leaf, Tensor) for leaf in given]
        begins = not follows or pattern != self._pattern or any(map(self._new, given))
        if begins:
            self.stretches.append(Stretch())
        self._pattern = pattern
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
        """Keep nothing of the pass's autograd graph."""
        self._handed = None
        self.outside = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.outside]

    @property
    def kinds(self) -> list[Any]:
        return [kind_of(tensor) for tensor in self.outside]

    @property
    def blocks(self) -> list[nn.Module]:
        return [call.block for stretch in self.stretches for call in stretch.calls]


class Playing:
    """A pass whose stretches are played; as usual from a block on whose inputs are of another kind than recorded.

    Before there is a recording, the first block of a stretch runs all of it.
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
        if place == 0:
            play = stretch.play or stretch.run
            self._results = play(*(self.outside[number] for number in stretch.numbers), *stretch.trained())
            if stretch.layers:
                stretch.layers[0].watched(self._results[0])
        self._at += 1
        return call.result(self._results if call is stretch.calls[-1] else self._results[:1], self.outside)

    def _as_recorded(self, given: list[Any], spec: TreeSpec, call: Call) -> bool:
        """Whether a block may be played; tensors that are new in this pass are noted."""
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
        """The pass is over.

        Raises:
            DynloraError: not all blocks were run, so what the model said is not what it says.
        """
        if not self.usual and self._at < len(self._calls):
            raise unlike("the model left out blocks that it ran when they were recorded")


def unlike(what: str) -> DynloraError:
    """The error of a pass that began like the recorded one and is another."""
    return DynloraError(f"train.cuda_graphs: {what}", "set train.cuda_graphs: false, and please report this")


def kind_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """What a recording asks of a tensor that it is given."""
    return tensor.shape, tensor.dtype
