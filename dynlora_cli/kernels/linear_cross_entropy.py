"""Cross-entropy from a language model's hidden states, without all of its logits in memory.

With a large vocabulary, the logits and their gradient take most of the memory of a step, and where prompts carry no
loss most of them are not even needed. So for the forward pass the head is replaced by a stand-in that returns its
input: the model then returns hidden states. Those at positions with a target are multiplied with the head's weight in
chunks; the logits of a chunk are computed, used for loss and gradient, and dropped. The loss is the same. Where single
tokens have rows of their own in the head (models/token_rows.py), those get their gradient in the same pass.

Dimensions: N targets, n targets of one chunk, D hidden, V vocabulary, T tokens with rows of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError
from dynlora_cli.kernels import frozen
from dynlora_cli.models.patched import Patches
from dynlora_cli.models.token_rows import TokenHead

CHUNK = 1 << 22  # logits of one chunk: 16 MiB in fp32, and as much for their gradient
LEAST_ROWS = 256  # targets of one chunk: with fewer, reading the head's weight takes longer than multiplying with it

Judge = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
Head = nn.Linear | TokenHead


class Ending:
    """How the loss of one model is computed from what its head is given.

    Attributes:
        fused: in chunks, as this file does; False: from all logits at once, for comparisons.
        judge: computes loss and gradient of a chunk; None: `loss_and_gradient`, the other one is `compiled_judge`.
        head_is_last: whether the model returns what its head returns; None before the first forward pass has shown it.
    """

    fused: bool = True
    judge: Judge | None = None
    head_is_last: bool | None = None


_ENDINGS: weakref.WeakKeyDictionary[nn.Module, Ending] = weakref.WeakKeyDictionary()


def ending(model: nn.Module) -> Ending:
    """The `Ending` of a model, of which there is one for as long as the model lives."""
    found = _ENDINGS.get(model)
    if found is None:
        found = _ENDINGS[model] = Ending()
    return found


def run_to_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Head | None, Tensor]:
    """Run a model up to its head, or up to its logits where the head cannot be left out.

    It can be left out if it is a frozen linear layer and the model returns the head's output as it is. Some models
    scale or cap the logits afterwards. The first pass finds out: it runs the head and looks whether the very tensor
    that the head returned comes back.

    Returns:
        the head and its input, the hidden states [B, T, D]; or None and the logits [B, T, V].
    """
    head, end = _plain_head(model), ending(model)
    if head is None or end.head_is_last is False:
        return None, model(**inputs).logits
    known, multiply = end.head_is_last is not None, head.forward
    passes: list[tuple[Tensor, Tensor]] = []  # what the head was given, and what it returned

    def stand_in(hidden: Tensor) -> Tensor:
        passes.append((hidden, hidden if known else multiply(hidden)))
        return passes[-1][1]

    with Patches() as patches:
        patches.set(head, "forward", stand_in)
        returned = model(**inputs).logits
    end.head_is_last = bool(passes) and returned is passes[-1][1]
    return (head, passes[-1][0]) if end.head_is_last else (None, returned)


def steps_aside(model: nn.Module) -> bool:
    """Whether a forward pass has shown already that the model's head can be left out."""
    return ending(model).head_is_last is True and _plain_head(model) is not None


def decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """The decoder's input for writing `labels` [B, T]: the labels shifted by one, behind a start token.

    Empty for a model that has no decoder of its own.

    Raises:
        UsageError: the model's config does not name the start token.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return {"decoder_input_ids": shift(labels)}
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    # M2M100 and Blenderbot have no method for it: they shift the labels inside their own loss.
    first = getattr(config, "decoder_start_token_id", None)
    if first is None:
        raise UsageError(
            "the model's config names no decoder_start_token_id, which its decoder reads first",
            "write it into the model's config.json",
        )
    ids = torch.cat([torch.full_like(labels[:, :1], first), labels[:, :-1]], 1)
    return {"decoder_input_ids": ids.masked_fill(ids < 0, config.pad_token_id)}


def _plain_head(model: nn.Module) -> Head | None:
    if not ending(model).fused or not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    linear = head.base if isinstance(head, TokenHead) else head
    frozen = type(linear) is nn.Linear and not linear.weight.requires_grad and linear.weight.is_floating_point()
    return head if frozen else None


def chunks(
    hidden_ND: Tensor, targets_N: Tensor, head: Head, least: int = LEAST_ROWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields targets [n] and logits [n, V] of one chunk after the other."""
    rows = max(least, CHUNK // head.out_features)
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        yield targets, _logits(hidden, head)


def _logits(hidden_nD: Tensor, head: Head) -> Tensor:
    if isinstance(head, TokenHead):
        return head(hidden_nD)
    return frozen.linear(hidden_nD, head.weight, head.bias)


def loss_and_gradient(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of every target, at least fp32 [n], and its gradient for the logits, in `dtype` [n, V].

    The gradient is softmax, minus 1 at the target. The loss is -log of the target's probability, which saves a second
    pass over the logits. Where that probability underflows to 0, the loss is computed from the logits instead.
    """
    place, least = targets_n[:, None], torch.finfo(torch.float32).tiny
    grad_nV = logits_nV.softmax(-1, dtype=torch.promote_types(logits_nV.dtype, torch.float32))
    share_n = grad_nV.gather(1, place)
    loss_n = -share_n.log()
    # Only a CPU is asked whether any underflows: on a GPU, Python would have to wait for the answer, and a fake tensor
    # has no values. There the exact loss is always computed.
    if share_n.device.type != "cpu" or type(share_n) is not Tensor or bool((share_n < least).any()):
        best_n, at_n = logits_nV.max(-1, keepdim=True)
        exact_n = best_n.to(grad_nV) - logits_nV.gather(1, place).to(grad_nV) - grad_nV.gather(1, at_n).log()
        loss_n = torch.where(share_n < least, exact_n, loss_n)
    grad_nV.scatter_add_(1, place, grad_nV.new_full(place.shape, -1.0))
    return loss_n[:, 0], grad_nV.to(dtype)


def compiled_judge() -> Judge:
    """`loss_and_gradient` as compiled code, which reads the logits twice and writes nothing but the gradient."""

    def pure(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        log_nV = logits_nV.float().log_softmax(-1)
        at_target = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == targets_n[:, None]
        return -torch.where(at_target, log_nV, 0.0).sum(-1), (log_nV.exp() - at_target.float()).to(dtype)

    compiled = torch.compile(pure)

    def judge(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch._dynamo.maybe_mark_dynamic(logits_nV, 0)
        torch._dynamo.maybe_mark_dynamic(targets_n, 0)
        return compiled(logits_nV, targets_n, dtype)

    return judge


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(head(hidden))[target] of every target, in nats. [N]

    The forward pass computes the gradient for the hidden states as well, while it has the logits of a chunk. A target's
    loss depends on its own hidden state alone, so whatever weights the backward pass comes with scale whole rows of it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head, judge: Judge | None, rows_TD: Tensor | None
    ) -> Tensor:
        dtype, losses, grads, of_rows = _product_type(head.weight), [], [], []
        least = LEAST_ROWS if judge is None else 2 * LEAST_ROWS  # compiled code needs half the memory per row
        judge = judge or loss_and_gradient
        for targets, logits in chunks(hidden_ND, targets_N, head, least):
            loss_n, grad_nV = judge(logits, targets, dtype)
            losses.append(loss_n)
            with torch.autocast(grad_nV.device.type, enabled=False):
                if isinstance(head, TokenHead) and rows_TD is not None:
                    grad_nV, grad_nT = head.parted(grad_nV)
                    of_rows.append(grad_nT)
                    grads.append(torch.addmm(grad_nT @ rows_TD.to(dtype), grad_nV, head.weight.to(dtype)))
                else:
                    grads.append(frozen.back(grad_nV, head.weight.to(dtype)))
        ctx.save_for_backward(torch.cat(grads), *([torch.cat(of_rows), hidden_ND] if of_rows else ()))
        ctx.dtype = hidden_ND.dtype
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_N: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, *of_rows = ctx.saved_tensors
        grad_TD = None
        if of_rows:
            grad_NT, hidden_ND = of_rows
            exact = torch.promote_types(hidden_ND.dtype, torch.float32)
            with torch.autocast(hidden_ND.device.type, enabled=False):
                grad_TD = (grad_NT.to(exact) * weight_N[:, None]).T @ hidden_ND.to(exact)
        return (grad_ND * weight_N[:, None].to(grad_ND.dtype)).to(ctx.dtype), None, None, None, grad_TD


def _product_type(weight_VD: Tensor) -> torch.dtype:
    """The dtype in which the gradient of the logits is multiplied with the head's weight.

    Autocast's dtype or the weight's, but fp32 instead of fp16: the loss scale, which keeps small gradients from
    underflowing in fp16, is only multiplied in the backward pass, and this product is computed before it.
    """
    device = weight_VD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return torch.float32 if torch.float16 in (dtype, weight_VD.dtype) else dtype


def linear_losses(hidden_ND: Tensor, targets_N: Tensor, head: Head, judge: Judge | None = None) -> Tensor:
    """The losses of `LinearCrossEntropy`, at least fp32 [N]; `judge` as in `Ending`."""
    rows_TD = head.rows() if isinstance(head, TokenHead) else None
    return LinearCrossEntropy.apply(hidden_ND, targets_N, head, judge, rows_TD)


def linear_cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: Head, judge: Judge | None = None) -> Tensor:
    """Their sum, a scalar."""
    return linear_losses(hidden_ND, targets_N, head, judge).sum()
