"""The loss: summed over supervised tokens, so that every token weighs the same whatever the batch it falls into.

    summed_loss   of one batch, to train on
    held_out      the mean over many batches
    row_sums      the same, kept apart by rows: what an interval needs

Dimensions: B rows, T tokens of a row, V vocabulary, N supervised tokens (or rows, for classification).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.scores import RowSums, perplexity

if TYPE_CHECKING:
    from dynlora_cli.batches import Batch

IGNORE = -100


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the batch's targets, and the number of targets predicted right.

    Labels are aligned with the logits already: `labels[:, t]` is the target of `logits[:, t]`, or -100.

    Returns:
        (loss, correct), both scalars; loss in fp32.
    """
    logits_NV, targets_N, _ = _targets(model, batch)
    correct = (logits_NV.detach().argmax(-1) == targets_N).sum()
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"), correct


def _targets(model: nn.Module, batch: Batch, *, only_targets: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] at the batch's targets, the targets [N], and the line of the batch [N] that each stands in.

    Args:
        only_targets: let the model make logits only at positions where some row has a target, if it can: over a large
            vocabulary the logits of the prompts are most of the memory of a forward pass.
    """
    targets, more = batch.labels, {}
    if only_targets and targets.ndim == 2 and "logits_to_keep" in signature(model.forward).parameters:
        positions = (targets != IGNORE).any(0).nonzero()[:, 0]
        targets, more = targets[:, positions], {"logits_to_keep": positions}
    logits = model(**batch.inputs, **more).logits
    if targets.ndim == 1:
        return logits, targets, torch.arange(len(targets), device=targets.device)
    supervised = targets != IGNORE
    return logits[supervised], targets[supervised], supervised.nonzero()[:, 0]


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
    return {"loss": loss, "tokens": int(targets), "perplexity": perplexity(loss)}


def row_sums(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classify: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RowSums:
    """What the model does on every row; summed, it is what `held_out` finds.

    Args:
        model: in any mode.
        batches: on the model's device, unpacked: one row a line.
        classify: also tell the chosen classes.
        autocast: makes the context of the forward pass.
    """
    found: list[Tensor] = []  # of each batch: loss, targets, correct [3, B]
    chosen: list[Tensor] = []
    with evaluating(model), autocast():
        for batch in batches:
            logits_NV, targets_N, line_N = _targets(model, batch, only_targets=True)
            choice_N = logits_NV.argmax(-1)
            loss_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
            parts_3N = torch.stack(
                [loss_N.double(), torch.ones_like(loss_N).double(), (choice_N == targets_N).double()]
            )
            sums_3B = torch.zeros(3, len(batch.labels), dtype=torch.float64, device=loss_N.device)
            found.append(sums_3B.index_add_(1, line_N, parts_3N).cpu())
            chosen.append(choice_N.cpu() if classify else choice_N[:0].cpu())
    loss_R, targets_R, correct_R = torch.cat(found, 1).numpy()
    predicted_R = torch.cat(chosen).numpy() if classify else None
    return RowSums(loss_R, targets_R.astype(np.int64), correct_R.astype(np.int64), predicted_R)
