"""Micro-batches of several runs as one: its rows are theirs, one run after the other, padded to the widest.

Dimensions: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.data.batches import Batch
from dynlora_cli.data.examples import IGNORED

# Tokens of a joint pass at most, as a multiple of what the runs would compute alone. Padding costs nothing where a pass
# is as long as its launches or as reading the weights takes; on a CPU that is so up to some 20 tokens.
MOST_PADDED = 1.5


def width_of(batch: Batch) -> int:
    """Tokens of its longest row."""
    return batch.inputs["input_ids"].shape[1]


def together(batches: Sequence[Batch]) -> list[list[int]]:
    """Which micro-batches go through the model in one pass, by their places in the sequence.

    Those that are alike in kind (packed or not), and near enough in width.
    """
    groups: list[list[int]] = []
    widest_first = sorted(range(len(batches)), key=lambda place: (_kind(batches[place]), -width_of(batches[place])))
    for place in widest_first:
        if groups and _fits([batches[other] for other in groups[-1]], batches[place]):
            groups[-1].append(place)
        else:
            groups.append([place])
    return [sorted(group) for group in groups]


def _kind(batch: Batch) -> str:
    mask = batch.inputs["attention_mask"]
    return f"{sorted(batch.inputs)} {mask.ndim} {mask.dtype}"


def _fits(group: Sequence[Batch], batch: Batch) -> bool:
    """Whether a batch, none wider than those of the group, may join it."""
    if _kind(batch) != _kind(group[0]) or batch.judge is not None:  # whose loss is not summed over targets
        return False
    sizes = [(len(each.inputs["input_ids"]), width_of(each)) for each in (*group, batch)]
    padded = sum(rows for rows, _ in sizes) * sizes[0][1]
    return padded <= MOST_PADDED * sum(rows * width for rows, width in sizes)


def joined(batches: Sequence[Batch]) -> Batch:
    """One micro-batch of all rows; of one kind, see `together`. Its targets come run after run."""
    width = max(map(width_of, batches))
    inputs = [dict(_widened(batch, width)) for batch in batches]
    labels = [F.pad(batch.labels, (0, width - batch.labels.shape[1]), value=IGNORED) for batch in batches]
    return Batch(
        {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]},
        torch.cat(labels),
        rows=[row for batch in batches for row in batch.rows],
        tokens=sum(batch.tokens for batch in batches),
        supervised=sum(batch.supervised for batch in batches),
    )


def _widened(batch: Batch, width: int) -> Iterator[tuple[str, Tensor]]:
    """Its inputs with more padding on the right, which no token sees."""
    more = width - width_of(batch)
    for name, tensor in batch.inputs.items():
        if tensor.ndim == 2:  # of a mask, 0 is closed; elsewhere any number will do
            yield name, F.pad(tensor, (0, more))
        else:
            yield name, _wider_mask(tensor, more)


def _wider_mask(mask: Tensor, more: int) -> Tensor:
    """A packed mask [B, 1, T, T] with `more` padding, which sees itself: softmax over no open position is NaN."""
    is_open, closed = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    wider = F.pad(mask, (0, more, 0, more), value=closed)
    wider.diagonal(dim1=-2, dim2=-1)[..., mask.shape[-1] :] = is_open
    return wider
