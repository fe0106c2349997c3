"""Cross-entropy from a language model's hidden states, without its logits in memory.

Over a large vocabulary the logits and their gradient are most of the memory of a step, and where prompts carry no loss
most of them are not even needed. Here the head steps aside, so that the model returns what the head would have seen;
only positions with a target are taken, and their logits are made, used and dropped in chunks. The loss is the same.

Dimensions: N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError

CHUNK = 1 << 22  # logits at a time: 16 MiB in fp32, and as much for their gradient
LEAST_ROWS = 256  # of a chunk: with fewer, reading the head's weight costs more than multiplying with it

Judge = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


class Heads:
    """Which models end with their head: told by each model's first forward pass."""

    use: ClassVar[bool] = True  # False: logits throughout, to compare with
    compiled: ClassVar[Judge | None] = None  # instead of `loss_and_gradient`, see `compiled_judge`
    last: ClassVar[weakref.WeakKeyDictionary[nn.Module, bool]] = weakref.WeakKeyDictionary()


def run_to_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Linear | None, Tensor]:
    """Run a model as far as its head, or to its logits where the head must stay.

    The head can step aside where it is a frozen linear layer and what it returns is what the model returns: some models
    scale or cap the logits afterwards.

    Returns:
        the head and what it would have seen, [B, T, D]; or None and the logits.
    """
    head = _plain_head(model)
    if head is None or not Heads.last.get(model, True):
        return None, model(**inputs).logits
    known, multiply = model in Heads.last, head.forward
    passes: list[tuple[Tensor, Tensor]] = []  # what the head was given, and what it returned

    def stand_in(hidden: Tensor) -> Tensor:
        passes.append((hidden, hidden if known else multiply(hidden)))
        return passes[-1][1]

    head.forward = stand_in  # type: ignore[assignment]
    try:
        returned = model(**inputs).logits
    finally:
        del head.forward
    Heads.last[model] = bool(passes) and returned is passes[-1][1]
    return (head, passes[-1][0]) if Heads.last[model] else (None, returned)


def steps_aside(model: nn.Module) -> bool:
    """Whether a forward pass has shown already that the model's head can step aside."""
    return Heads.last.get(model, False) and _plain_head(model) is not None


def decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder reads while it writes `labels` [B, T]: the same, one later.

    Raises:
        UsageError: nobody says what it reads first.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return {"decoder_input_ids": shift(labels)}
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    first = getattr(config, "decoder_start_token_id", None)  # M2M100, Blenderbot: they shift where they compute a loss
    if first is None:
        raise UsageError(
            "the model's config names no decoder_start_token_id, which its decoder reads first",
            "write it into the model's config.json",
        )
    ids = torch.cat([torch.full_like(labels[:, :1], first), labels[:, :-1]], 1)
    return {"decoder_input_ids": ids.masked_fill(ids < 0, config.pad_token_id)}


def _plain_head(model: nn.Module) -> nn.Linear | None:
    if not Heads.use or not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    frozen = type(head) is nn.Linear and not head.weight.requires_grad and head.weight.is_floating_point()
    return head if frozen else None


def chunks(
    hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear, least: int = LEAST_ROWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets [n] and logits [n, V], a few at a time."""
    rows = max(least, CHUNK // head.out_features)
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        yield targets, F.linear(hidden, head.weight, head.bias)


def loss_and_gradient(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The summed loss in fp32, and its gradient for the logits: softmax minus one at the target. [n, V] in `dtype`"""
    place, least = targets_n[:, None], torch.finfo(torch.float32).tiny
    grad_nV = logits_nV.softmax(-1, dtype=torch.float32)  # one exponential for each logit
    share_n = grad_nV.gather(1, place)
    loss_n = -share_n.log()
    # A GPU is not asked, since it would have to wait, nor a fake tensor, which does not know.
    if share_n.device.type != "cpu" or type(share_n) is not Tensor or bool((share_n < least).any()):
        best_n, at_n = logits_nV.max(-1, keepdim=True)
        exact_n = best_n.float() - logits_nV.gather(1, place).float() - grad_nV.gather(1, at_n).log()
        loss_n = torch.where(share_n < least, exact_n, loss_n)
    grad_nV.scatter_add_(1, place, grad_nV.new_full(place.shape, -1.0))
    return loss_n.sum(), grad_nV.to(dtype)


def compiled_judge() -> Judge:
    """`loss_and_gradient` as one piece of code, which reads the logits twice and writes nothing but the gradient."""

    def pure(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_nV = logits_nV.float().log_softmax(-1)
        at_target = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == targets_n[:, None]
        return -torch.where(at_target, log_nV, 0.0).sum(), (log_nV.exp() - at_target.float()).to(dtype)

    compiled = torch.compile(pure)

    def judge(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch._dynamo.maybe_mark_dynamic(logits_nV, 0)
        torch._dynamo.maybe_mark_dynamic(targets_n, 0)
        return compiled(logits_nV, targets_n, dtype)

    return judge


class LinearCrossEntropy(torch.autograd.Function):
    """Σ over targets of -log softmax(head(hidden))[target], in nats; the gradient for hidden is made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        judge, dtype = Heads.compiled or loss_and_gradient, _product_type(head.weight)
        grads = []
        least = LEAST_ROWS if Heads.compiled is None else 2 * LEAST_ROWS  # a row takes half the memory there
        for targets, logits in chunks(hidden_ND, targets_N, head, least):
            loss, grad_nV = judge(logits, targets, dtype)
            total += loss
            with torch.autocast(grad_nV.device.type, enabled=False):
                grads.append(grad_nV @ head.weight.to(dtype))
        ctx.save_for_backward(torch.cat(grads))
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad.to(grad_ND.dtype)).to(ctx.dtype), None, None


def _product_type(weight_VD: Tensor) -> torch.dtype:
    """In which the gradient of the logits is multiplied with the head's weight.

    In fp16 small probabilities vanish before the backward pass multiplies with the loss scale, so there it is fp32.
    """
    device = weight_VD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return torch.float32 if torch.float16 in (dtype, weight_VD.dtype) else dtype


def linear_cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
    """The summed loss of `LinearCrossEntropy`, a scalar in fp32."""
    return LinearCrossEntropy.apply(hidden_ND, targets_N, head)
