"""`train.cuda_graphs`: training passes through the model's blocks, recorded once and then played in one launch.

A GPU is done with the kernels of a block before Python has handed out those of the next one, unless the block is large.
A recording needs no Python: it is the same kernels on the same memory. So it holds for one shape of the batch and as
long as the components stay; after an event the blocks run as usual until a new one is made.

A pass is listened to before it is recorded: what is each block given, and what does it return? Blocks of which each is
given what the one before it returned are recorded as one stretch. In later passes stand-ins take the blocks' places:
the first of a stretch plays it, the others hand on what they are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dynlora_cli.compile_blocks import blocks_in_place, mark_dynamic
from dynlora_cli.components import ComponentLinear
from dynlora_cli.errors import DynloraError, MachineError

if TYPE_CHECKING:
    from dynlora_cli.pool import Pool

SIGHTINGS = 3  # of a shape, before it is recorded
LEAST_PASSES = 32  # that a recording has to serve: making it takes as long as about ten
MOST_SHAPES = 16  # at a time; their inputs and outputs stay in memory
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
    """One block in one pass: the leaves of its arguments and of what it returned, each a constant where no tensor."""

    block: nn.Module
    given: list[Any]
    given_spec: TreeSpec
    returned: list[Any]
    returned_spec: TreeSpec

    @property
    def hands_on(self) -> bool:
        """Whether it returned one tensor and no more."""
        return sum(leaf is HANDED for leaf in self.returned) == 1

    def result(self, tensors: Iterable[Tensor]) -> Any:
        """What the block would return if these were the tensors in it."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is HANDED else leaf for leaf in self.returned]
        return tree_unflatten(leaves, self.returned_spec)


@dataclass
class Stretch:
    """Blocks that are recorded as one function of tensors: what comes from outside, and what trains."""

    calls: list[Call] = field(default_factory=list)
    layers: list[ComponentLinear] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)
    play: Play | None = None

    @property
    def numbers(self) -> list[int]:
        """Of the tensors that come from outside."""
        return sorted({leaf.number for call in self.calls for leaf in call.given if isinstance(leaf, Outside)})

    def add(self, call: Call) -> None:
        self.calls.append(call)
        self.layers += [part for part in call.block.modules() if isinstance(part, ComponentLinear)]
        self.leaves += [parameter for parameter in call.block.parameters() if parameter.requires_grad]

    def trained(self) -> list[Tensor]:
        """What trains in it: the copies that hand gradients on to the pool where there are such, or the leaves."""
        return [half for layer in self.layers for half in layer.low or () if half.requires_grad] or list(self.leaves)

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the blocks; to be recorded."""
        rest = iter(tensors)
        outside = {number: next(rest) for number in self.numbers}
        for layer in self.layers:
            if layer.low and layer.low[1].requires_grad:
                a_CI, b_OC = (next(rest) if half.requires_grad else half for half in layer.low)
                layer.__dict__["low"] = a_CI, b_OC
        results: list[Tensor] = []
        for call in self.calls:
            leaves = [outside[leaf.number] if isinstance(leaf, Outside) else leaf for leaf in call.given]
            args, kwargs = tree_unflatten([results[0] if leaf is HANDED else leaf for leaf in leaves], call.given_spec)
            results = [leaf for leaf in tree_leaves(call.block(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return tuple(results)


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

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given, given_spec = tree_flatten((args, kwargs))
        result = block(*args, **kwargs)
        returned, returned_spec = tree_flatten(result)
        tensors = [leaf for leaf in returned if isinstance(leaf, Tensor)]
        for leaf in (*given, *returned):
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                self.strange = f"its blocks are given or return a {type(leaf).__name__}"
        if not tensors:
            self.strange = "its blocks return no tensor"
        begins = not any(leaf is self._handed for leaf in given) or any(map(self._new, given))
        if begins:
            self.stretches.append(Stretch())
        call = Call(
            block,
            [self._noted(leaf, begins=begins) for leaf in given],
            given_spec,
            [HANDED if isinstance(leaf, Tensor) else leaf for leaf in returned],
            returned_spec,
        )
        self.stretches[-1].add(call)
        self._handed = tensors[0] if call.hands_on else None
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
    def blocks(self) -> list[nn.Module]:
        return [call.block for stretch in self.stretches for call in stretch.calls]


class Playing:
    """A pass whose stretches are played; as usual from a block on whose inputs are of another kind than recorded."""

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
        stretch, place, call = self._calls[self._at] if self._at < len(self._calls) else (None, 0, None)
        given, spec = tree_flatten((args, kwargs))
        if stretch is None or call is None or call.block is not block or not self._as_recorded(given, spec, call):
            if place or self._at == len(self._calls):
                raise DynloraError(
                    "train.cuda_graphs: the blocks were given other inputs than when they were recorded",
                    "set train.cuda_graphs: false, and please report this",
                )
            self.usual = True
            return block(*args, **kwargs)
        if place == 0:
            assert stretch.play is not None
            self._results = stretch.play(*(self.outside[number] for number in stretch.numbers), *stretch.trained())
            if stretch.layers:
                stretch.layers[0].watched(self._results[0])
        self._at += 1
        return call.result(self._results if call is stretch.calls[-1] else self._results[:1])

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
                    same = _kind(leaf) == self.kinds[known.number]
                else:
                    same = known.number < len(self.outside) and leaf is self.outside[known.number]
            else:
                same = type(leaf) is type(known) and leaf == known
            if not same:
                return False
        return True

    @property
    def complete(self) -> bool:
        return self.usual or self._at == len(self._calls)


class BlockGraphs:
    """Records the blocks of a model as CUDA graphs and plays them in its training passes.

    Args:
        model: with its components in place; called with keyword arguments.
        pool: holds them.
        tell: is told why nothing can be recorded, where that is so.
        make: from functions and tensors to give them makes functions that play recordings of them.

    Attributes:
        passes_left: for how many passes the components will stay; the caller knows.
        recorded: recordings made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Pool,
        tell: Callable[[str], None],
        make: Callable[..., Any] = torch.cuda.make_graphed_callables,
    ) -> None:
        self.model, self.pool, self.tell, self.make = model, pool, tell, make
        self.places = list(blocks_in_place(model))
        self.passes_left = self.recorded = 0
        self.given_up = False
        self._forget()
        pool.copies_stay = True
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def _forget(self) -> None:
        self._values = self.pool.values
        self._seen: Counter[Any] = Counter()
        self._heard: dict[Any, Listening] = {}
        self._recordings: dict[Any, tuple[list[Stretch], list[Any]]] = {}
        self._memory: Any = None
        self._pass: Listening | Playing | None = None

    def _begin(self, model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        """Before a pass of the model: put the stand-ins in place if it is to be played or listened to."""
        if self.given_up or not model.training or not torch.is_grad_enabled():
            return
        if self._values is not self.pool.values:  # components have gone, and the memory that was recorded with them
            self._forget()
        key = _key(kwargs)
        if key in self._heard and not self.pool.graphs:
            self._record(key)
        if key in self._recordings:
            self._pass = Playing(*self._recordings[key])
        elif self.passes_left >= LEAST_PASSES and len(self._recordings) < MOST_SHAPES:
            self._seen[key] += 1
            if self._seen[key] >= SIGHTINGS:
                self._pass = Listening(key)
        if self._pass:
            for container, index, block in self.places:
                container[index] = StandIn(block, self._pass)

    def _end(self, *_: Any) -> None:
        """After a pass, also one that failed: put the blocks back."""
        if self._pass is None:
            return
        turn, self._pass = self._pass, None
        for container, index, block in self.places:
            container[index] = block
        if isinstance(turn, Playing):
            if not turn.complete:
                raise DynloraError(
                    "train.cuda_graphs: the model left out blocks that it ran when they were recorded",
                    "set train.cuda_graphs: false, and please report this",
                )
        elif turn.strange or turn.blocks != [block for _, _, block in self.places]:
            self._give_up(turn.strange or "it does not run every block once, in their order")
        else:
            turn.let_go()
            self._heard[turn.key] = turn

    def _give_up(self, why: str) -> None:
        self._forget()
        self.given_up = True
        self.tell(f"train.cuda_graphs: {type(self.model).__name__} cannot be recorded ({why}); it goes on as usual")

    def _record(self, key: Any) -> None:
        """Make recordings of what was heard; the gradients, the copies and the random numbers are then as before.

        Raises:
            MachineError: CUDA did not record it. The state of the GPU is not to be relied on then.
        """
        heard, device = self._heard.pop(key), self._values.device
        layers = list(self.pool.layers.values())
        low = [layer.low for layer in layers]
        gradients = [(parameter, parameter.grad.clone()) for parameter in self._trained() if parameter.grad is not None]
        on, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        if self._memory is None and device.type == "cuda":
            self._memory = torch.cuda.graph_pool_handle()
        samples = tuple(self._samples(stretch, heard.outside) for stretch in heard.stretches)
        functions = tuple(stretch.run for stretch in heard.stretches)
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.autocast(device.type, dtype, enabled=on, cache_enabled=False),
            ):
                made = self.make(functions, samples, allow_unused_input=True, pool=self._memory)
        except RuntimeError as error:  # of torch
            raise MachineError(
                f"train.cuda_graphs: CUDA cannot record the blocks of {type(self.model).__name__}: "
                + str(error).strip().split("\n")[0],
                "set train.cuda_graphs: false; with --resume the run goes on at its last checkpoint",
            ) from error
        for stretch, play in zip(heard.stretches, made, strict=True):
            stretch.play = play
        self._recordings[key] = heard.stretches, [_kind(tensor) for tensor in heard.outside]
        self.recorded += 1
        for layer, pair in zip(layers, low, strict=True):
            layer.__dict__["low"] = pair
        for parameter, gradient in gradients:
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        self.pool.graphs.clear()  # those of the recording, through which no backward will run

    def _trained(self) -> Iterator[nn.Parameter]:
        leaves = {id(p) for layer in self.pool.layers.values() for p in (layer.a_CI, layer.b_OC)}
        yield self.pool.values
        yield from (p for p in self.model.parameters() if p.requires_grad and id(p) not in leaves)

    def _samples(self, stretch: Stretch, outside: list[Tensor]) -> tuple[Tensor, ...]:
        """What a recording will read: memory of its own for what comes from outside, the place itself of the rest."""
        own = {number: outside[number].detach().clone() for number in stretch.numbers}
        for number, tensor in own.items():
            tensor.requires_grad_(outside[number].requires_grad)
        if not any(tensor.requires_grad for tensor in own.values()):
            # One has to get a gradient, or the engine waits for the stream of leaves that get none, which is not the
            # recorded one: fused layers add to their leaves' gradients themselves.
            given = (own[leaf.number] for leaf in stretch.calls[0].given if isinstance(leaf, Outside))
            next(tensor for tensor in given if tensor.is_floating_point()).requires_grad_(True)
        trained = [tensor if tensor.is_leaf else tensor.detach().requires_grad_(True) for tensor in stretch.trained()]
        if trained and not isinstance(trained[0], nn.Parameter):  # the copies, for compiled code
            rest = iter(trained)
            for layer in stretch.layers:
                a_CI, _ = layer.low  # type: ignore[misc]
                mark_dynamic([(next(rest) if a_CI.requires_grad else a_CI, next(rest))])
        return (*own.values(), *trained)


def _key(inputs: dict[str, Any]) -> Any:
    """What the blocks' inputs follow from: tensors of rows and tokens, not which of them have targets."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    return tuple((name, _kind(tensor)) for name, tensor in tensors.items())


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def refuse_without_gpu(device: torch.device) -> None:
    """
    Raises:
        MachineError: there is no GPU to record anything on.
    """
    if device.type != "cuda":
        raise MachineError("train.cuda_graphs: there is no GPU here", "set it to false")
