"""The loss: summed over supervised tokens, so that every token weighs the same whatever the batch it falls into.

    summed_loss   of one batch, to train on
    held_out      the mean over many batches
    row_sums      the same, kept apart by rows: what an interval needs

Dimensions: B rows, T tokens of a row, V vocabulary, N supervised tokens (or rows, for classification).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynlora_cli.tasks.loss import evaluating, judged
from dynlora_cli.tasks.scores import RowSums, means, perplexity

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Tally


def held_out(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    describe: Callable[[float, float], dict[str, float]] = lambda loss, accuracy: {"perplexity": perplexity(loss)},  # noqa: ARG005
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Mean loss over all targets of the batches.

    Args:
        model: in any mode.
        batches: on the model's device.
        autocast: makes the context of the forward pass.
        describe: what to tell beside the loss, of the loss and the share of targets that were the first choice; where
            the rows' judge has numbers of its own, those are told.
        reduce: sums a tensor over processes.

    Returns:
        loss (nats per target), tokens (number of targets), and what is told beside it.
    """
    sums, names, beside = torch.zeros(3, dtype=torch.float64), tuple[str, ...](), torch.zeros(2, 0, dtype=torch.float64)
    tally = _Tallied()
    with evaluating(model), autocast():
        for batch in batches:
            if numbers := _numbers(model, batch):
                loss_N, others = numbers.pop("loss"), torch.stack(list(numbers.values())).double().cpu()
                found = [loss_N.sum().item(), 0.0, batch.supervised]
                names, part = tuple(numbers), torch.stack([others.nansum(1), (~others.isnan()).double().sum(1)])
                beside = part if not beside.numel() else beside + part
            else:
                loss_N, choice_N, targets_N, _ = tally.judged(model, batch)
                found = [loss_N.sum().item(), (choice_N == targets_N).sum().item(), batch.supervised]
            sums += torch.tensor(found, dtype=torch.float64)
    total, correct_total, targets = reduce(sums).tolist()
    loss = total / targets
    if names:
        added, counts = (dict(zip(names, row, strict=True)) for row in reduce(beside).tolist())
        return {"loss": loss, "tokens": int(targets), **means(added, counts)}
    return {"loss": loss, "tokens": int(targets), **describe(loss, correct_total / targets), **tally.numbers()}


def _numbers(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the judge of a batch tells of its rows; empty where there is none, or it tells nothing."""
    return batch.judge.numbers(model, batch) if batch.judge is not None else {}


def row_sums(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    choices: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RowSums:
    """What the model does on every row; summed, it is what `held_out` finds.

    Args:
        model: in any mode.
        batches: on the model's device, unpacked.
        choices: also tell what was chosen for each target.
        autocast: makes the context of the forward pass.
    """
    found: list[Tensor] = []  # for each batch: loss, targets, correct [3, B]
    chosen: list[Tensor] = []
    told: dict[str, list[Tensor]] = {}
    tally = _Tallied()
    with evaluating(model), autocast():
        for batch in batches:
            if numbers := {name: part_B.double().cpu() for name, part_B in _numbers(model, batch).items()}:
                loss_B = numbers.pop("loss")
                right_B = numbers.get("accuracy", torch.zeros_like(loss_B))
                found.append(torch.stack([loss_B, torch.ones_like(loss_B), right_B]))
                for name, part_B in numbers.items():
                    told.setdefault(name, []).append(part_B)
                continue
            loss_N, choice_N, targets_N, line_N = tally.judged(model, batch)
            parts_3N = torch.stack(
                [loss_N.double(), torch.ones_like(loss_N).double(), (choice_N == targets_N).double()]
            )
            sums_3B = torch.zeros(3, len(batch.rows), dtype=torch.float64, device=loss_N.device)
            found.append(sums_3B.index_add_(1, line_N, parts_3N).cpu())
            chosen.append(choice_N.cpu() if choices else choice_N[:0].cpu())
    loss_R, targets_R, correct_R = torch.cat(found, 1).numpy()
    predicted_R = torch.cat(chosen).numpy() if choices and chosen else None
    numbers_R = {name: torch.cat(parts).numpy() for name, parts in told.items()}
    counts = (targets_R.astype(np.int64), correct_R.astype(np.int64))
    return RowSums(loss_R, *counts, predicted_R, numbers_R, tally.numbers())


class _Tallied:
    """Judges batches, and tells the numbers of their judge, if they have one."""

    def __init__(self) -> None:
        self.tally: Tally | None = None

    def judged(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if batch.judge is None:
            return judged(model, batch)
        if self.tally is None:
            self.tally = batch.judge.tally()
        return self.tally.judged(model, batch)

    def numbers(self) -> dict[str, float]:
        return self.tally.numbers() if self.tally else {}
