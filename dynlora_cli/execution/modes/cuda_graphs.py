"""CUDA graphs: the forward and backward pass of the model's blocks, captured once and then replayed.

What it does:
    With a small model or batch, Python launches kernels more slowly than the GPU runs them. A CUDA graph needs no
    Python: one launch replays the same kernels on the same memory addresses. That is also its limit. A capture is valid
    for one batch shape, and for as long as the components keep their tensors: a pruning event replaces those, so after
    an event the blocks run as usual until new captures are made.

    How a batch shape gets its capture:

    1. The first two passes of the shape only count it, since many shapes come too rarely to be worth a capture.
    2. The third pass is traced (`Listening` in execution/block_trace.py): every block runs as usual, and what it is
       given and what it returns is noted. Consecutive blocks, each fed by the output of the one before it, form a
       `Stretch`.
    3. At the next pass the trace is checked (`_sound`), and every stretch is captured (`_record`).
    4. From then on that pass and all later ones replay (`Playing`). Each block is replaced by a stand-in for the
       duration of the pass: the first stand-in of a stretch replays all of it, the others pass the result along.

    "Recording" is the name of a captured graph in this code, and "playing" that of a replay.

When to use it:
    On a GPU that waits for Python: a base of a few billion weights or less, or few tokens in a batch.

Reference:
    torch.cuda.make_graphed_callables, in PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.execution import mode
from dynlora_cli.execution.block_trace import Listening, Playing, StandIn, Stretch, kind_of
from dynlora_cli.execution.blocks import blocks_in_place, draws, mark_dynamic, skips_blocks
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.experts import fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.whole import Trained

ORDER = 50
# What does not run the same kernels on the same memory in every pass.
CONFLICTS = [
    {
        "with": "rank.elastic",
        "why": "a recorded pass uses the same components each time",
        "hint": "set one of the two back",
    },
    {
        "with": "adapter.variant",
        "is_not": "lora",
        "why": "variant lora alone is recorded",
        "hint": "set one of the two back",
    },
    {
        "with": "adapter.names_experts",
        "at": "adapter.target_modules",
        "why": "which tokens an expert gets is another question in every pass",
        "hint": "leave one of the two out",
    },
    {
        "with": "model.load_in_8bit",
        "why": "8 bits look for outliers in every pass",
        "hint": "load_in_4bit can be recorded",
    },
    {
        "with": "model.attn_implementation",
        "contains": "flash",
        "why": "it looks for padding in every pass",
        "hint": "sdpa can be recorded",
    },
    {
        "with": "adapter.dropout",
        "while": {"train.gradient_checkpointing": [True, "offload"]},
        "why": "checkpointing asks for the state of random numbers, which is not recorded",
        "hint": "leave one of the three out",
    },
    {
        "with": "train.gradient_checkpointing",
        "is": "offload",
        "why": "copies to the host are not recorded",
        "hint": "write true instead",
    },
    {"with": "train.shard_base", "why": "blocks in parts are not recorded", "hint": "set one of the two to false"},
]
SIGHTINGS = 3  # the pass of a batch shape, counted from 1, that is traced; the capture is made one pass later
LEAST_PASSES = 32  # a capture costs as much time as about ten passes, so fewer than this are not worth one
ROUNDING = 0.02  # relative difference of logits that counts as rounding
MOST_SHAPES = 16  # batch shapes captured at a time; each keeps its own inputs and outputs in GPU memory


class Mode(mode.Mode):
    """`train.cuda_graphs`."""

    # A graph must not read a cast that was made outside of it. So it is for the whole run, passes that are not captured
    # too, since torch.compile would compile again for the other setting.
    keeps_casts = False
    even_batches = True
    no_answers = "train.cuda_graphs records passes through whole batches"
    in_short_runs = False
    graphs: BlockGraphs | None = None

    def refuse(self, device: torch.device, processes: int) -> None:
        refuse_without_gpu(device)

    def prepare(self, model: PreTrainedModel) -> None:
        refuse_unsuitable(model, self.train.gradient_checkpointing is not False)

    def begin(
        self, model: PreTrainedModel, trained: Trained, forward: Callable[[], object], tell: Callable[[str], None]
    ) -> None:
        if isinstance(trained, Pool):
            self.graphs = BlockGraphs(model, trained, tell)
            self.patches.callback(self.graphs.close)

    def before_step(self, step: int, passes_left: int) -> None:
        if self.graphs:
            self.graphs.passes_left = passes_left

    def report(self) -> list[str]:
        if self.graphs is None:
            return []
        recorded, played = self.graphs.recorded, self.graphs.played
        return [f"passes through the blocks were recorded {recorded} times and played {played} times"]


class BlockGraphs:
    """Captures the blocks of a model as CUDA graphs and replays them in its training passes.

    Works through hooks on the model: creating this object is enough, and nobody calls it afterwards, until `close`. The
    caller only keeps `passes_left` up to date.

    Args:
        model: with its components in place; called with keyword arguments.
        pool: holds the components.
        tell: called with a message if this model cannot be captured; training then goes on without.
        make: turns functions and sample inputs into functions that replay them; another one in tests without a GPU.

    Attributes:
        passes_left: number of passes until the components change next; set by the caller before every step.
        recorded: captures made so far, one for each batch shape.
        played: passes in which all blocks were replayed.
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
        pool.copies_stay = True  # a replay reads the low-precision copies of the components at fixed addresses
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Let the model run as without, and free the captures."""
        for hook in self._hooks:
            hook.remove()
        self.pool.copies_stay = False
        self._forget()

    def _forget(self) -> None:
        self._values = self.pool.values
        self._seen: Counter[Any] = Counter()
        self._heard: dict[Any, Listening] = {}
        self._recordings: dict[Any, tuple[list[Stretch], list[Any]]] = {}
        self._memory: Any = None
        self._pass: Listening | Playing | None = None

    def _begin(self, model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward pass: put the stand-ins in place if the pass is to be replayed or traced."""
        if self.given_up or not model.training or not torch.is_grad_enabled():
            return
        self._forget_gone()
        key, worth = _key(kwargs), self.passes_left >= LEAST_PASSES
        # While an autograd graph of an earlier micro-batch is alive, a capture could not claim the leaves: see
        # `_OneStream`. Then the capture waits for a later pass.
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
        """After a pruning event: free the captures, which read tensors that the pool no longer uses."""
        if self._values is self.pool.values:
            return
        some = bool(self._recordings)
        self._forget()
        if some:
            gc.collect()  # what make_graphed_callables returns is in a reference cycle
            if self._values.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _sound(self, heard: Listening, kwargs: dict[str, Any]) -> bool:
        """Whether the logits stay the same if the first block of a stretch does the work of all.

        In a replay, every block of a stretch returns what the last one computed. That is wrong for a model which also
        uses the output of a block in the middle, and the trace cannot show such a use: so both ways are run, compared.
        """
        if draws(self.model):  # two passes differ anyway, so nothing could be compared
            return True
        with self._copies_kept():
            usual = _rows(self.model(**kwargs).logits)  # without gradients, so `_begin` leaves this pass alone
            self._put_in_place(Playing(heard.stretches, heard.kinds))
            try:
                found = _rows(self.model(**kwargs).logits)
            finally:
                self._take_out()
        return not bool((found - usual).norm() > ROUNDING * usual.norm())

    @contextmanager
    def _copies_kept(self) -> Iterator[None]:
        """Restore afterwards the cast copies (`layer.low`) that the pass under way has prepared.

        Passes inside the block prepare and forget copies of their own.
        """
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

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        """After a forward pass, even one that failed: put the blocks back."""
        if self._pass is None:
            return
        turn, self._pass = self._pass, None
        self._take_out()
        if output is None:  # the pass failed; its own error is on the way
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
        """Capture what was traced. Gradients, cast copies and random-number states are left as they were.

        Raises:
            MachineError: CUDA could not capture it. The GPU may be in an undefined state, so the run ends.
        """
        heard, device = self._heard.pop(key), self._values.device
        trained = [self.pool.values, *self.pool.others(self.model)]
        # kernels/fused_lora.py adds to `.grad` by itself, even in the warm-up, so gradients are put back at the end.
        gradients = [(parameter, parameter.grad.clone()) for parameter in trained if parameter.grad is not None]
        # All captures share one memory pool: no two batches are ever under way at the same time.
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
        """The tensors whose addresses a capture will read.

        For inputs that differ from pass to pass: buffers of the capture's own, into which every replay copies. For what
        trains: the very tensors, which keep their addresses until the next event.
        """
        own = {number: outside[number].detach().clone() for number in stretch.numbers}
        for number, tensor in own.items():
            tensor.requires_grad_(outside[number].requires_grad)
        trained = [tensor if tensor.is_leaf else tensor.detach().requires_grad_(True) for tensor in stretch.trained()]
        if trained and not isinstance(trained[0], nn.Parameter):  # the cast copies, which compiled blocks train
            # These are new tensors: torch.compile must be told again that the number of components is variable.
            rest = iter(trained)
            for layer in stretch.layers:
                a_CI, _ = layer.low  # type: ignore[misc]
                mark_dynamic([(next(rest) if a_CI.requires_grad else a_CI, next(rest))])
        return (*own.values(), *trained)


class _OneStream:
    """A stretch that always runs on the capture stream, also during the warm-up, and then drops its autograd graph.

    Works around a limit of `torch.cuda.make_graphed_callables`. Autograd has one node per leaf that accumulates its
    gradient. The node remembers the CUDA stream on which it was created, lives as long as any autograd graph through
    the leaf, and makes every backward pass wait for that stream. During a capture it is an error to wait for any stream
    but the capturing one. And `make_graphed_callables` warms up on a side stream, whose last graph is still alive when
    the capture begins; so is the graph of an earlier capture when the next one begins. Hence both remedies here: one
    stream for all, and no graph is left alive.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.run = run
        self.stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream if device.type == "cuda" else None
        self.made: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.let_go()
        with torch.cuda.stream(self.stream):  # with None the current stream stays
            # `detach_` in `let_go` does not work on views.
            made = tuple(tensor.clone() if tensor._is_view() else tensor for tensor in self.run(*tensors))
        self.made = [tensor for tensor in made if tensor.requires_grad]
        return made

    def let_go(self) -> None:
        """Drop the autograd graph of the last results; no backward pass needs it any more."""
        while self.made:
            self.made.pop().detach_()


def _rows(logits: Tensor) -> Tensor:
    """The logits of at most 256 tokens in fp32, enough to compare."""
    return logits.flatten(0, -2)[:256].float()


def _key(inputs: dict[str, Any]) -> Any:
    """Batches with the same key can share a capture: every tensor of rows x tokens has the same shape and dtype.

    One-dimensional tensors are left out: they say which tokens have targets, which matters to the head alone.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    return tuple((name, kind_of(tensor)) for name, tensor in tensors.items())


def refuse_unsuitable(model: PreTrainedModel, checkpointing: bool) -> None:
    """Refuse a model that does not run the same kernels in every pass.

    Raises:
        UsageError: it skips blocks at random, or it may draw random numbers and is to be checkpointed: the
            recomputation would draw others, since saving the state of the generators cannot be captured.
    """
    name, hint = type(model).__name__, "set train.cuda_graphs: false"
    if skips_blocks(model):
        raise UsageError(f"train.cuda_graphs: {name} skips blocks at random (layerdrop)", hint)
    if checkpointing and (draws(model) or fused_experts(model)):
        text = (
            f"train.cuda_graphs: {name} may draw random numbers (dropout, routers), whose state checkpointing asks for"
        )
        raise UsageError(text, f"{hint}, or train.gradient_checkpointing")


def refuse_without_gpu(device: torch.device) -> None:
    """
    Raises:
        MachineError: there is no GPU to record anything on.
    """
    if device.type != "cuda":
        raise MachineError("train.cuda_graphs: there is no GPU here", "set it to false")
