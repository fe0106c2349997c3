"""Cross-entropy from a language model's hidden states, without its logits in memory.

Over a large vocabulary the logits and their gradient are most of the memory of a step, and where prompts carry no loss
most of them are not even needed. Here the head steps aside, so that the model returns what the head would have seen;
only positions with a target are taken, and their logits are made, used and dropped in chunks. The loss is the same.

Dimensions: N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

CHUNK = 1 << 22  # logits at a time: 16 MiB in fp32
LEAST_ROWS = 256  # of a chunk: with fewer, reading the head's weight costs more than multiplying with it


class Heads:
    """Which models can be run without their head; asked once for each."""

    use: ClassVar[bool] = True  # False: ordinary logits throughout, to compare with
    _last: ClassVar[weakref.WeakKeyDictionary[nn.Module, bool]] = weakref.WeakKeyDictionary()


def free_head(model: nn.Module) -> nn.Linear | None:
    """The model's output layer, if it is a frozen linear layer and the last thing that the model does.

    Some models scale or cap the logits afterwards; a head that returns large numbers in place of logits tells.
    """
    if not Heads.use or not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or not head.weight.is_floating_point():
        return None
    if model not in Heads._last:
        Heads._last[model] = _is_last(model, head)
    return head if Heads._last[model] else None


@torch.no_grad()
def _is_last(model: PreTrainedModel, head: nn.Linear) -> bool:
    large = torch.tensor([1000.0, -1000.0, 3.0], device=head.weight.device)

    def stand_in(hidden: Tensor) -> Tensor:
        return large.to(hidden.dtype).expand(*hidden.shape[:-1], 3)

    with _replaced(head, stand_in):
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device)).logits
    return torch.equal(logits.float(), large.expand(1, 2, 3))


@contextmanager
def _replaced(head: nn.Linear, forward: Any) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def hidden_states(model: nn.Module, head: nn.Linear, inputs: dict[str, Tensor]) -> Tensor:
    """What the head would have seen at every position, [B, T, D]."""
    with _replaced(head, lambda hidden: hidden):
        hidden: Tensor = model(**inputs).logits
    return hidden


def chunks(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, targets and fp32 logits [n, V] of a few targets at a time."""
    rows = max(LEAST_ROWS, CHUNK // head.out_features)
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        yield hidden, targets, F.linear(hidden, head.weight, head.bias).float()


class LinearCrossEntropy(torch.autograd.Function):
    """Σ over targets of -log softmax(head(hidden))[target], in nats; the gradient for hidden is made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND)
        done = 0
        for hidden, targets, logits in chunks(hidden_ND, targets_N, head):
            place = targets[:, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, place)).sum()
            # From here on the logits' memory holds their gradient: softmax minus one at the target.
            logits.sub_(normaliser).exp_()
            logits.scatter_add_(1, place, torch.full_like(normaliser, -1.0))
            grad_ND[done : done + len(hidden)] = logits.to(head.weight.dtype) @ head.weight
            done += len(hidden)
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None


def linear_cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
    """The summed loss of `LinearCrossEntropy`, a scalar in fp32."""
    return LinearCrossEntropy.apply(hidden_ND, targets_N, head)  # type: ignore[no-any-return, no-untyped-call]
