"""The loss of a batch: summed over targets, so that means are over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.kernels.linear_cross_entropy import (
    Head,
    chunks,
    decoder_inputs,
    ending,
    linear_cross_entropy,
    linear_losses,
    run_to_head,
    steps_aside,
)

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch


IGNORE = -100


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the batch's targets: a scalar in fp32, to train on. Or what its judge says.

    Labels are aligned with the logits already: `labels[:, t]` is the target of `logits[:, t]`, or -100.
    """
    if batch.judge is not None:
        return batch.judge.loss(model, batch)
    head, states, targets_N, _ = at_targets(model, batch)
    if head is None:
        return F.cross_entropy(states.float(), targets_N, reduction="sum")
    return linear_cross_entropy(states, targets_N, head, ending(model).judge)


def target_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target, nats, at least fp32 [N], to train on; and the line that each stands in [N].

    For objectives that put them together in their own way. As in `summed_loss`, not all logits are in memory at once.
    """
    head, states, targets_N, line_N = at_targets(model, batch)
    if head is None:
        exact = torch.promote_types(states.dtype, torch.float32)
        return F.cross_entropy(states.to(exact), targets_N, reduction="none"), line_N
    return linear_losses(states, targets_N, head, ending(model).judge), line_N


def at_targets(model: nn.Module, batch: Batch) -> tuple[Head | None, Tensor, Tensor, Tensor]:
    """The model's output at the batch's targets only, so that no logits are computed for prompts.

    Returns:
        the model's head and hidden states [N, D] for it, or None and logits [N, V]; the targets [N]; and the row of
        the batch that each belongs to [N].
    """
    targets, place_N = batch.labels, batch.places
    if targets.ndim == 1:
        return None, model(**batch.inputs).logits, targets, torch.arange(len(targets), device=targets.device)
    more = decoder_inputs(model, targets)
    if not steps_aside(model) and "logits_to_keep" in signature(model.forward).parameters:
        positions = (targets != IGNORE).any(0).nonzero()[:, 0]
        targets, more = targets[:, positions], {**more, "logits_to_keep": positions}
        place_N = (targets.flatten() != IGNORE).nonzero()[:, 0]
    head, states = run_to_head(model, {**batch.inputs, **more})
    assert place_N is not None
    states_ND = states.flatten(0, 1).index_select(0, place_N)  # index_select has a cheaper gradient than a boolean mask
    return head, states_ND, targets.flatten()[place_N], place_N // targets.shape[1]


def logits_at_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """For objectives of their own: what the model says at the batch's targets, fp32 [N, V], and the targets [N]."""
    head, states, targets_N, _ = at_targets(model, batch)
    return (states if head is None else head(states)).float(), targets_N


def judged(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every target [N]: its loss (nats, fp32), the model's choice, the target itself, and its row in the batch."""
    if batch.judge is not None:
        return batch.judge.judged(model, batch)
    head, states, targets_N, line_N = at_targets(model, batch)
    parts = [(targets_N, states)] if head is None else chunks(states, targets_N, head)
    judged = [
        (F.cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(-1)) for targets, logits in parts
    ]
    loss_N, choice_N = (torch.cat(part) for part in zip(*judged, strict=True))
    return loss_N, choice_N, targets_N, line_N


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the mode is put back whatever happens."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
