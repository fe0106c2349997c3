"""The loss: summed over supervised tokens, so that every token weighs the same whatever the batch it falls into.

Dimensions: B rows, T tokens of a row, V vocabulary, N supervised tokens (or rows, for classification).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dynlora_cli.batches import Batch

IGNORE = -100


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the batch's targets, and the number of targets predicted right.

    Labels are aligned with the logits already: `labels[:, t]` is the target of `logits[:, t]`, or -100.

    Returns:
        (loss, correct), both scalars; loss in fp32.
    """
    logits = model(**batch.inputs).logits
    targets = batch.labels
    if targets.ndim == 2:
        supervised = targets != IGNORE
        logits, targets = logits[supervised], targets[supervised]  # [N, V], [N]
    correct = (logits.detach().argmax(-1) == targets).sum()
    return F.cross_entropy(logits.float(), targets, reduction="sum"), correct


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


def held_out(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classify: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Mean loss over all targets of the batches.

    Args:
        model: in any mode.
        batches: on the model's device.
        classify: also report accuracy instead of perplexity.
        autocast: makes the context of the forward pass.
        reduce: sums a tensor over processes.

    Returns:
        loss (nats per target), tokens (number of targets), and perplexity or accuracy.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(model), autocast():
        for batch in batches:
            loss, correct = summed_loss(model, batch)
            sums += torch.tensor([loss.item(), correct.item(), batch.supervised], dtype=torch.float64)
    total, correct_total, targets = reduce(sums).tolist()
    loss = total / targets
    if classify:
        return {"loss": loss, "tokens": int(targets), "accuracy": correct_total / targets}
    return {"loss": loss, "tokens": int(targets), "perplexity": math.exp(min(loss, 700.0))}
