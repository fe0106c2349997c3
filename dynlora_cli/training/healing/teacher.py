"""Healing under the adapter before the cut: what it says of the rows counts beside what the rows say.

    loss = (1 - share) · cross-entropy + share · cross-entropy to the probabilities of the adapter before

which is, up to a constant, share · KL(before, after) [Hinton et al. 2015, arXiv 1503.02531, at temperature 1]. The
adapter before looks once at every row that comes up, before the first step, and its `MOST` likeliest tokens are kept:
what the rest of a vocabulary gets is not taught.

Dimensions, as suffixes of names:
    N  targets of a batch, n of one chunk or row      V  vocabulary      M  tokens that are kept of each target
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_cli import plugins
from dynlora_cli.kernels.linear_cross_entropy import chunks, linear_losses
from dynlora_cli.tasks.loss import at_targets, evaluating
from dynlora_cli.tasks.objective import Objective

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.batches import Batch

MOST = 64  # tokens


class Teacher(NamedTuple):
    """The adapter before the cut, and its share of the loss."""

    adapter: Adapter
    share: float


NOT_BY_TOKEN = "--teacher: these rows are not learned token by token"


def learns_tokens(task: str, objective: str = plugins.OBJECTIVE) -> bool:
    """Whether a task of this name has tokens for targets, and their cross-entropy for loss."""
    return objective == plugins.OBJECTIVE and plugins.target(task, objective) == "token"


@dataclass(frozen=True)
class Told:
    """What the adapter before says of the targets of a row.

    Attributes:
        token_nM: its likeliest tokens, int32.
        probability_nM: theirs, fp32.
    """

    token_nM: Tensor
    probability_nM: Tensor


def ask(
    model: nn.Module, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager[None]]
) -> dict[int, Told]:
    """What the model says of rows, by their numbers; the batches are not packed: line i of one is its row i."""
    told: dict[int, Told] = {}
    with evaluating(model):
        for batch in batches:
            with autocast():
                head, states_ND, targets_N, line_N = at_targets(model, batch)
                parts = [(targets_N, states_ND)] if head is None else chunks(states_ND, targets_N, head)
                likeliest = [_likeliest(logits_nV) for _, logits_nV in parts]
            value_NM, token_NM = (torch.cat(part) for part in zip(*likeliest, strict=True))
            for line, row in enumerate(batch.rows):
                told[row] = Told(token_NM[line_N == line], value_NM[line_N == line])
    return told


def _likeliest(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, fp32 [n, M], and tokens, int32 [n, M]."""
    value_nM, token_nM = logits_nV.float().softmax(-1).topk(min(MOST, logits_nV.shape[-1]))
    return value_nM, token_nM.int()


class Taught(Objective):
    """Cross-entropy to the rows' targets and to what was told of them.

    Args:
        options: the recipe's `train` section.
        told: by row.
        share: of the loss that is to what was told.
    """

    def __init__(self, options: Train, told: dict[int, Told], share: float) -> None:
        super().__init__(options)
        self.told, self.share = told, share

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        head, states_ND, targets_N, _ = at_targets(model, batch)
        rows = [self.told[row] for row in batch.rows]
        token_NM = torch.cat([told.token_nM for told in rows]).long()
        share_NM = torch.cat([told.probability_nM for told in rows]) * self.share
        if head is None:
            log_NV = states_ND.float().log_softmax(-1)
            right_N = log_NV.gather(1, targets_N[:, None])[:, 0]
            return -((1 - self.share) * right_N + (share_NM * log_NV.gather(1, token_NM)).sum(-1)).sum()
        begun = 0

        def judge(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            nonlocal begun
            part = slice(begun, begun := begun + len(targets_n))
            return mixed(logits_nV, targets_n, token_NM[part], share_NM[part], 1 - self.share, dtype)

        return linear_losses(states_ND, targets_N, head, judge).sum()


def mixed(
    logits_nV: Tensor, targets_n: Tensor, token_nM: Tensor, share_nM: Tensor, own: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss of every target [n], and its gradient for the logits, in `dtype` [n, V].

    Args:
        logits_nV, targets_n: of a chunk.
        token_nM, share_nM: what was told, and how much each token counts.
        own: how much the target counts.
    """
    place = targets_n[:, None]
    log_nV = logits_nV.float().log_softmax(-1)
    # No vecdot: autocast would compute it in bf16.
    loss_n = -own * log_nV.gather(1, place)[:, 0] - (share_nM * log_nV.gather(1, token_nM)).sum(-1)
    grad_nV = log_nV.exp_().mul_(own + share_nM.sum(-1, keepdim=True))
    grad_nV.scatter_add_(1, token_nM, -share_nM)
    grad_nV.scatter_add_(1, place, grad_nV.new_full(place.shape, -own))
    return loss_n, grad_nV.to(dtype)
