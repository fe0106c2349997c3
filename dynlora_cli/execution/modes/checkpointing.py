"""`train.gradient_checkpointing`: which activations the forward pass keeps for the backward pass, and where.

true      the inputs of the blocks; the backward pass computes the rest again
offload   likewise, and the inputs wait in the host's memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError


def checkpoint_activations(
    model: PreTrainedModel, how: Literal[True, "offload"] = True, *, preserve_rng_state: bool = True
) -> None:
    """Keep the inputs of blocks alone in the forward pass; with "offload" outside the GPU's memory.

    Args:
        model: any.
        how: see above.
        preserve_rng_state: False where no block draws random numbers.

    Raises:
        UsageError: the model's own code has no place to say where.
    """
    options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if how != "offload":
        return
    host = Host()
    blocks = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    if not blocks:
        raise UsageError(
            f"train.gradient_checkpointing: {type(model).__name__} checkpoints in a way of its own and cannot offload",
            "write true instead of offload",
        )
    for module in blocks:
        module._gradient_checkpointing_func = host.checkpoint  # type: ignore[assignment]


class Host:
    """The host's memory as the place of what a checkpointed block was given.

    Copies to it run beside the computation, in a stream of their own. On a CPU the tensors stay where they are.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def checkpoint(self, block: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Run a block, keeping its first input here; the backward pass runs it again.

        What else it is given (masks, positions, what an encoder said) all blocks share: it stays where it is.
        """
        # Not the tensor: the functions live until the backward pass, and would keep it where it is.
        own = next((_identity(tensor) for tensor in inputs if isinstance(tensor, Tensor)), None)

        def put(tensor: Tensor) -> Any:
            return self.put(tensor) if _identity(tensor) == own else tensor

        def get(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.get(kept)

        with saved_tensors_hooks(put, get):  # for the inputs alone: inside the block others take their place
            return checkpoint(block, *inputs, **{**options, "use_reentrant": False})

    def put(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        """The tensor's device, and its copy in pinned memory."""
        device = tensor.device
        if device.type == "cpu":
            return device, tensor
        if device.type != "cuda" or isinstance(tensor, FakeTensor):
            return device, tensor.to("cpu")
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is free when the copy is made
        return device, copy

    def get(self, kept: tuple[torch.device, Tensor]) -> Tensor:
        """The tensor, on its device again."""
        device, copy = kept
        if device.type == "cuda" and device in self._streams:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        return copy.to(device, non_blocking=True)


def _identity(tensor: Tensor) -> tuple[torch.Size, int]:
    """Alike for two objects that are one tensor, as long as it lives: what hooks get may be an alias."""
    return tensor.shape, tensor.untyped_storage()._cdata
