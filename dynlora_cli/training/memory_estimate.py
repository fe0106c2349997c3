"""What a run needs of memory, before it runs: one training step whose tensors have shapes and no numbers.

torch's FakeTensorMode gives every operation the result that it would have on the device, without computing or storing
it, so the step takes a second or two for a model of any size, and its peak is counted tensor by tensor.

Not counted: what an allocator loses between tensors, some percent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from dynlora_cli import plugins
from dynlora_cli.decoding import prefix
from dynlora_cli.kernels.linear_cross_entropy import chunks, decoder_inputs, linear_cross_entropy, run_to_head
from dynlora_cli.models.load import Base
from dynlora_cli.models.targets import inside
from dynlora_cli.tasks.loss import evaluating
from dynlora_cli.training.optimizers import state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.config.sections import Model
    from dynlora_cli.lora.whole import Trained
    from dynlora_cli.training.before.lessons import Reading

# Buffers that the matrix libraries take at their first product, and CUDA's context with its kernels; measured.
MKL_BYTES, CUDA_BYTES = 128 << 20, 512 << 20
AUTO_MODEL = "AutoModel"  # what loads a model without a head, whose hidden states become vectors
USABLE = 0.9  # share of the free memory that tensors can fill; the rest is lost between them
# Bytes a weight in 4 bits: blocks of 64 share a scale in fp32, which double quantization stores in 8 bits.
NF4, NF4_DOUBLE = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / 64 / 256


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a training step, before anything is pruned.

    Attributes:
        base: the frozen weights.
        adapter: what trains, with its gradient, at the start of the run.
        optimizer: the moments of what trains.
        activations: the rest: what the backward pass needs, and the largest temporary tensors.
        teacher: what takes the place of the activations before the first step, while a teacher reads; 0: there is none.
        libraries: what the process holds besides: its code, or CUDA's context.
        rows, length: of the batch: rows of a micro-batch, and the tokens of its longest row.
        free: bytes that the device has for all this.
    """

    base: int
    adapter: int
    optimizer: int
    activations: int
    libraries: int
    rows: int
    length: int
    free: int
    teacher: int = 0

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.optimizer + max(self.activations, self.teacher) + self.libraries

    @property
    def most_rows(self) -> int:
        """Rows of a micro-batch that fit: activations grow with them, the rest does not."""
        room = USABLE * self.free - (self.base + self.adapter + self.optimizer + self.libraries)
        return max(0, int(room * self.rows // self.activations))

    @property
    def teacher_fits(self) -> bool:
        """Whether there is room for what a teacher reads at once."""
        return self.teacher <= self.activations or self.total <= USABLE * self.free

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total, "most_rows": self.most_rows}


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive on a device, each storage once, but not those `known` from before."""

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._device = device.type
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.device.type != self._device:
                continue
            if (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


def measure(
    base: Base,
    attach: Callable[[], Trained],
    options: Model,
    device: torch.device,
    ids: tuple[int, int],
    optimizer: str = "adamw",
    reading: Reading | None = None,
) -> Need:
    """The need of one step, and of a teacher's reading before it.

    Args:
        base: its structure alone, on the device "meta"; it is changed, and of no use afterwards.
        attach: puts the components on it.
        options: how the weights are stored.
        device: where the run will be.
        ids: rows of a micro-batch, and tokens of its longest row.
        optimizer: its name in the recipe.
        reading: what a teacher reads at once, where the run has one.
    """
    vectors = plugins.declared("tasks", options.task, "AUTO_MODEL") == AUTO_MODEL
    model: PreTrainedModel = base.model.to(dtype=base.dtype)  # type: ignore[call-arg]
    with FakeTensorMode(allow_non_fake_inputs=True):
        shared = _shared(model)
        model.to_empty(device=device)
        for (first, key), *others in shared:  # each module got a tensor of its own
            for module, name in others:
                module._parameters[name] = first._parameters[key]
        model.train()
        quantized = _quantized(base, options)
        trains = attach()
        trained: list[nn.Parameter] = [parameter for group in trains.groups(model) for parameter in group["params"]]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in (*trained, *model.parameters()) if p.grad is not None]
        tokens = torch.zeros(ids, dtype=torch.long, device=device)
        _step(base, tokens, vectors=vectors)  # the first makes all logits, see kernels/linear_cross_entropy.py
        held = [*model.parameters(), *model.buffers(), *trained, *gradients]
        with _Peak(device, [*held, tokens]) as peak:
            _step(base, tokens, vectors=vectors)
        read = 0 if reading is None else _read(base, reading, device, held)
    leaves = set(map(id, trains.leaves))
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in leaves]
    weights = _bytes(frozen) - _bytes(quantized) + round(_per_weight(options) * sum(p.numel() for p in quantized))
    largest = max((_bytes([p]) for p in quantized), default=0)  # one at a time is dequantized
    libraries, free = _around(device)
    moments = sum(state_bytes(optimizer, parameter) for parameter in trained)
    taught = read + largest if read else 0
    return Need(weights, 2 * _bytes(trained), moments, peak.peak + largest, libraries, *ids, free, taught)


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that several modules have in common."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _around(device: torch.device) -> tuple[int, int]:
    """What a training process holds besides tensors, and the memory that is free for all of it."""
    if device.type == "cuda":
        return CUDA_BYTES, torch.cuda.mem_get_info(device)[0]
    own = psutil.Process().memory_info().rss
    return own + MKL_BYTES, psutil.virtual_memory().available + own


def _quantized(base: Base, options: Model) -> list[Tensor]:
    """The weights that bitsandbytes will store in fewer bits: of all linear layers but the output layer or the head."""
    if not (options.load_in_4bit or options.load_in_8bit):
        return []
    kept = base.model.get_output_embeddings()
    return [
        module.weight
        for name, module in base.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not kept and not inside(name, base.whole)
    ]


def _per_weight(options: Model) -> float:
    """Bytes of a quantized weight."""
    if options.load_in_8bit:
        return 1.0
    return NF4_DOUBLE if options.bnb_4bit_use_double_quant else NF4


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(base: Base, ids: Tensor, *, vectors: bool) -> None:
    """Forward and backward, as if every token were a target, or each line a vector."""
    with torch.autocast(ids.device.type, base.dtype, enabled=base.dtype != torch.float32):
        if base.head is not None:
            logits = base.model(input_ids=ids).logits
            loss = F.cross_entropy(logits.float(), ids[:, 0], reduction="sum")
        elif vectors:
            loss = base.model(input_ids=ids).last_hidden_state.float().mean(1).square().sum()
        else:
            head, states = run_to_head(base.model, {"input_ids": ids, **decoder_inputs(base.model, ids)})
            states = states.flatten(0, 1)
            if head is None:
                loss = F.cross_entropy(states.float(), ids.flatten(), reduction="sum")
            else:
                loss = linear_cross_entropy(states, ids.flatten(), head)
    loss.backward()


def _read(base: Base, reading: Reading, device: torch.device, held: Iterable[Tensor]) -> int:
    """Bytes at the peak of a teacher's reading."""
    ids = torch.zeros((reading.texts, reading.tokens), dtype=torch.long, device=device)
    with (
        _Peak(device, [*held, ids]) as peak,
        evaluating(base.model),
        torch.autocast(device.type, base.dtype, enabled=base.dtype != torch.float32),
    ):
        inputs: dict[str, Any] = {"input_ids": ids[:, reading.same :]}
        if reading.same:
            cache = prefix.read(base.model, [0] * reading.same, reading.texts)
            inputs |= {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "use_cache": True}
        head, states = run_to_head(base.model, inputs)
        if head is not None:  # its logits are of a part of the targets at a time
            _, states = next(chunks(states.flatten(0, 1), inputs["input_ids"].flatten(), head))
        states.float().logsumexp(-1)
    return peak.peak
