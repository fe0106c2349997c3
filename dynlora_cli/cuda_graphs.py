"""`train.cuda_graphs`: training passes through the model's blocks, recorded once and then played in one launch.

A GPU is done with the kernels of a block before Python has handed out those of the next one, unless the block is large.
A recording needs no Python: it is the same kernels on the same memory. So it holds for one shape of the batch and as
long as the components stay; after an event the blocks run as usual until a new one is made.

A pass is listened to before it is recorded: what is each block given, and what does it return? Blocks of which each is
given what the one before it returned are recorded as one stretch. In later passes stand-ins take the blocks' places:
the first of a stretch plays it, the others hand on what they are given.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.activations import checkpoint_activations, draws
from dynlora_cli.compile_blocks import blocks_in_place, mark_dynamic, skips_blocks
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.experts import fused_experts
from dynlora_cli.stretches import Listening, Playing, StandIn, Stretch, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.pool import Pool

SIGHTINGS = 3  # of a shape, before it is recorded
LEAST_PASSES = 32  # that a recording has to serve: making it takes as long as about ten
ROUNDING = 0.02  # of logits, as a share of them
MOST_SHAPES = 16  # at a time; their inputs and outputs stay in memory


class BlockGraphs:
    """Records the blocks of a model as CUDA graphs and plays them in its training passes.

    Args:
        model: with its components in place; called with keyword arguments.
        pool: holds them.
        tell: is told why nothing can be recorded, where that is so.
        make: from functions and tensors to give them makes functions that play recordings of them.

    Attributes:
        passes_left: for how many passes the components will stay; the caller knows.
        recorded, played: recordings made so far, and passes in which all blocks were played.
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
        self.passes_left = self.recorded = self.played = 0
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
        self._forget_gone()
        key, worth = _key(kwargs), self.passes_left >= LEAST_PASSES
        if worth and key in self._heard and not self.pool.graphs:
            if self._sound(self._heard[key], kwargs):
                self._record(key)
            else:
                self._give_up("it uses more than what the last of its blocks returns")
        if key in self._recordings:
            self._pass = Playing(*self._recordings[key])
        elif worth and not self.given_up and len(self._recordings) + len(self._heard) < MOST_SHAPES:
            self._seen[key] += 1
            if self._seen[key] >= SIGHTINGS:
                self._pass = Listening(key)
        if self._pass:
            self._put_in_place(self._pass)

    def _forget_gone(self) -> None:
        """After an event: give back the memory of recordings of components that have gone."""
        if self._values is self.pool.values:
            return
        some = bool(self._recordings)
        self._forget()
        if some:
            gc.collect()  # what make_graphed_callables makes holds itself
            if self._values.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _sound(self, heard: Listening, kwargs: dict[str, Any]) -> bool:
        """Whether the model says the same if the first block of a stretch does the work of all.

        It does not if it uses what a block in the middle returned.
        """
        if draws(self.model):
            return True
        with self._copies_kept():
            usual = _rows(self.model(**kwargs).logits)  # nothing is played or heard without gradients
            self._put_in_place(Playing(heard.stretches, heard.kinds))
            try:
                found = _rows(self.model(**kwargs).logits)
            finally:
                self._take_out()
        return not bool((found - usual).norm() > ROUNDING * usual.norm())

    @contextmanager
    def _copies_kept(self) -> Iterator[None]:
        """Afterwards every layer has the copies that the pass which has begun was given."""
        kept = [(layer, layer.low) for layer in self.pool.layers.values()]
        yield
        for layer, low in kept:
            layer.__dict__["low"] = low

    def _put_in_place(self, turn: Listening | Playing) -> None:
        for container, index, block in self.places:
            container[index] = StandIn(block, turn)

    def _take_out(self) -> None:
        for container, index, block in self.places:
            container[index] = block

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:  # noqa: ARG002 - as hooks are called
        """After a pass, also one that failed: put the blocks back."""
        if self._pass is None:
            return
        turn, self._pass = self._pass, None
        self._take_out()
        if output is None:
            return
        if isinstance(turn, Playing):
            turn.finish()
            self.played += not turn.usual
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
        trained = [self.pool.values, *self.pool.others(self.model)]
        gradients = [(parameter, parameter.grad.clone()) for parameter in trained if parameter.grad is not None]
        if self._memory is None and device.type == "cuda":
            self._memory = torch.cuda.graph_pool_handle()
        samples = tuple(self._samples(stretch, heard.outside) for stretch in heard.stretches)
        functions = tuple(_OneStream(stretch.run, device) for stretch in heard.stretches)
        try:
            with self._copies_kept(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                made = self.make(functions, samples, allow_unused_input=True, pool=self._memory)
        except RuntimeError as error:  # of torch
            raise MachineError(
                f"train.cuda_graphs: CUDA cannot record the blocks of {type(self.model).__name__}: "
                + str(error).strip().split("\n")[0],
                "set train.cuda_graphs: false; add --resume, or --overwrite where there is no checkpoint yet",
            ) from error
        for stretch, function, play in zip(heard.stretches, functions, made, strict=True):
            function.let_go()
            stretch.play = play
        self._recordings[key] = heard.stretches, heard.kinds
        self.recorded += 1
        for parameter, gradient in gradients:
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]

    def _samples(self, stretch: Stretch, outside: list[Tensor]) -> tuple[Tensor, ...]:
        """What a recording will read: memory of its own for what comes from outside, the place itself of the rest."""
        own = {number: outside[number].detach().clone() for number in stretch.numbers}
        for number, tensor in own.items():
            tensor.requires_grad_(outside[number].requires_grad)
        trained = [tensor if tensor.is_leaf else tensor.detach().requires_grad_(True) for tensor in stretch.trained()]
        if trained and not isinstance(trained[0], nn.Parameter):  # the copies, for compiled code
            rest = iter(trained)
            for layer in stretch.layers:
                a_CI, _ = layer.low  # type: ignore[misc]
                mark_dynamic([(next(rest) if a_CI.requires_grad else a_CI, next(rest))])
        return (*own.values(), *trained)


class _OneStream:
    """Runs a stretch on the stream on which it is recorded, in the warm-up as well, and lets its graphs go.

    For as long as a graph through a leaf lives, autograd knows the leaf by the stream on which that graph was made, and
    waits for it: a recording cannot, for another than its own. `torch.cuda.make_graphed_callables` warms up on another,
    has the graph of the last warm-up still when it records, and keeps that of the recording.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.run = run
        self.stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream if device.type == "cuda" else None
        self.made: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.let_go()
        with torch.cuda.stream(self.stream):  # of None: as it is
            # What is a view cannot be cut off from its graph.
            made = tuple(tensor.clone() if tensor._is_view() else tensor for tensor in self.run(*tensors))
        self.made = [tensor for tensor in made if tensor.requires_grad]
        return made

    def let_go(self) -> None:
        """Of the graph that made the last results, through which no backward pass will go any more."""
        while self.made:
            self.made.pop().detach_()


def _rows(logits: Tensor) -> Tensor:
    """Of a few tokens, in fp32."""
    return logits.flatten(0, -2)[:256].float()


def _key(inputs: dict[str, Any]) -> Any:
    """What the blocks' inputs follow from: tensors of rows and tokens, not which of them have targets."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    return tuple((name, kind_of(tensor)) for name, tensor in tensors.items())


def prepare(model: PreTrainedModel, checkpointing: bool) -> None:
    """Checkpointing without the states of random numbers, which cannot be recorded.

    Raises:
        UsageError: the model draws such numbers, or leaves out blocks by chance.
    """
    name, hint = type(model).__name__, "set train.cuda_graphs: false"
    if skips_blocks(model):
        raise UsageError(f"train.cuda_graphs: {name} skips blocks at random (layerdrop)", hint)
    if not checkpointing:
        return
    if draws(model) or fused_experts(model):
        text = (
            f"train.cuda_graphs: {name} may draw random numbers (dropout, routers), whose state checkpointing asks for"
        )
        raise UsageError(text, f"{hint}, or train.gradient_checkpointing")
    checkpoint_activations(model, preserve_rng_state=False)


def refuse_without_gpu(device: torch.device) -> None:
    """
    Raises:
        MachineError: there is no GPU to record anything on.
    """
    if device.type != "cuda":
        raise MachineError("train.cuda_graphs: there is no GPU here", "set it to false")
