"""bitsandbytes' `Linear8bitLt`: LLM.int8(), a scale for each output.

Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

quantized = True


def matches(cls: type) -> bool:
    return any(base.__name__ == "Linear8bitLt" for base in cls.__mro__)  # not imported: that is slow


def dense(base: nn.Module) -> Tensor:
    weight: Any = base.weight
    if not hasattr(weight, "SCB"):  # not quantized yet
        return weight.detach().float()
    state: Any = base.state
    scales_O = weight.SCB if weight.SCB is not None else state.SCB  # the first pass moves them
    return weight.data.float() * (scales_O.view(-1, 1).float() / 127)


def forget(y: Tensor) -> None:
    """Free the input that the product keeps for the gradient of its weight.

    It is an attribute of the autograd node and not a saved tensor, so that gradient checkpointing would not free it
    either.
    """
    node: Any = y.grad_fn
    name = type(node).__name__
    if name == "MatMul8bitLtBackward":
        node.tensors = (None, None, None)
    elif name == "MatMul8bitFpBackward":  # on the CPU
        node.A = None
