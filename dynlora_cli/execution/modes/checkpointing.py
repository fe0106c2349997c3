"""Gradient checkpointing: the forward pass keeps only the inputs of the blocks, the backward pass runs them again.

What it does:
    `train.gradient_checkpointing: true` keeps the inputs of the blocks on the device; the backward pass runs each
    block again to get the rest. `offload` keeps them in the host's memory.

When to use it:
    When activations do not fit: long rows, large batches, large models. A step takes about a third more time.

Reference:
    Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv 1604.06174).
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
from dynlora_cli.execution import mode
from dynlora_cli.models.patched import Patches

KEY, ORDER = "gradient_checkpointing", 10
SWITCHES = "gradient_checkpointing", "_gradient_checkpointing_func"  # what transformers sets on modules


class Mode(mode.Mode):
    """`train.gradient_checkpointing`."""

    def prepare(self, model: PreTrainedModel) -> None:
        how = self.train.gradient_checkpointing
        assert how
        # Saving the state of the random generators is no work for a CUDA graph; see refuse_unsuitable in cuda_graphs.
        checkpoint_activations(model, how, preserve_rng_state=not self.train.cuda_graphs, patches=self.patches)


def checkpoint_activations(
    model: PreTrainedModel,
    how: Literal[True, "offload"] = True,
    *,
    preserve_rng_state: bool = True,
    patches: Patches | None = None,
) -> None:
    """Switch on gradient checkpointing, with "offload" into the host's memory.

    Args:
        model: changed in place.
        how: see above.
        preserve_rng_state: whether a block that runs again draws the same random numbers; False where none draws any.
        patches: undo it again; None: it stays for good.

    Raises:
        UsageError: the model has its own way of checkpointing, which cannot be told to offload.
    """
    patches = patches or Patches()
    for module in model.modules():  # so that they are as before in the end, whatever is set on them meanwhile
        for name in SWITCHES:
            if name in vars(module):
                patches.set(module, name, vars(module)[name])
            else:
                patches.callback(vars(module).pop, name, None)
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
    """Checkpointing that keeps the input of every block in the host's memory.

    Copies to the host overlap with the computation, on a CUDA stream of their own. On a CPU nothing is copied.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def checkpoint(self, block: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Run a block with its first tensor argument kept on the host; the backward pass runs the block again.

        The other arguments (mask, positions, an encoder's output) are shared by all blocks, so they stay on the GPU.
        """
        # Its identity and not the tensor itself: `put` lives until the backward pass and would keep it on the GPU.
        own = next((_identity(tensor) for tensor in inputs if isinstance(tensor, Tensor)), None)

        def put(tensor: Tensor) -> Any:
            return self.put(tensor) if _identity(tensor) == own else tensor

        def get(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.get(kept)

        # The hooks see the inputs of the block only: inside it, `checkpoint` installs hooks of its own.
        with saved_tensors_hooks(put, get):
            return checkpoint(block, *inputs, **{**options, "use_reentrant": False})

    def put(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        """Copy a tensor to the host. Returns its device and the copy, in pinned memory if it came from a GPU."""
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
        tensor.record_stream(stream)  # its memory may be reused once the copy is done, not before
        return device, copy

    def get(self, kept: tuple[torch.device, Tensor]) -> Tensor:
        """Copy what `put` returned back to its device."""
        device, copy = kept
        if device.type == "cuda" and device in self._streams:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        return copy.to(device, non_blocking=True)


def _identity(tensor: Tensor) -> tuple[torch.Size, int]:
    """Equal for two Python objects that stand for the same tensor, as the tensor that a hook is given may be an alias.

    Only while the tensor lives: its storage's address may be used again afterwards.
    """
    return tensor.shape, tensor.untyped_storage()._cdata
