"""A teacher beside the rows: what it says of their answers counts in the loss.

    loss = own · cross-entropy + share · cross-entropy to the teacher's probabilities        own = 1 - share

which is, up to a constant, share · KL(teacher, model) [Hinton et al. 2015, arXiv 1503.02531, at temperature 1]. The
teacher looks once at every row that comes up, before the first step, and its likeliest tokens are kept: what the rest
of a vocabulary gets is not taught. After that it is not needed again, so it may be the very model that is trained.

Dimensions, as suffixes of names:
    N  targets of a batch, n of one chunk or row      V  vocabulary      M  tokens that are kept of each target
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_cli.errors import DynloraError
from dynlora_cli.kernels.linear_cross_entropy import chunks, linear_losses
from dynlora_cli.tasks import objective
from dynlora_cli.tasks.loss import at_targets, evaluating, summed_loss

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example, OneText

MOST = 64  # tokens


class Row(NamedTuple):
    """What a teacher says of the targets of one row.

    Attributes:
        token_nM: its likeliest tokens, int32.
        probability_nM: theirs, fp16: within 2^-12 of 1, which is less than what is left out.
    """

    token_nM: Tensor
    probability_nM: Tensor


class Told:
    """What a teacher says of rows, by their numbers; in the memory of the CPU, 6 bytes a token.

    Args:
        most: tokens that are kept of each target.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: object) -> bool:
        return row in self._rows

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def learn(self, model: nn.Module, batch: Batch) -> None:
        """Have the model, as it is now, look at rows; line i of the batch is its row i, so it is not packed."""
        with evaluating(model):
            head, states_ND, targets_N, line_N = at_targets(model, batch)
            parts = [(targets_N, states_ND)] if head is None else chunks(states_ND, targets_N, head)
            likeliest = [self._likeliest(logits_nV) for _, logits_nV in parts]
        with torch.autocast("cpu", enabled=False):  # which knows no fp16
            value_NM, token_NM = (torch.cat(part).cpu() for part in zip(*likeliest, strict=True))
        counts = torch.bincount(line_N, minlength=len(batch.rows)).tolist()
        for row, token_nM, value_nM in zip(batch.rows, token_NM.split(counts), value_NM.split(counts), strict=True):
            self._rows.setdefault(row, Row(token_nM, value_nM))

    def _likeliest(self, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, fp16 [n, M], and tokens, int32 [n, M]."""
        exact_nV = logits_nV.float()
        value_nM, token_nM = exact_nV.topk(min(self.most, logits_nV.shape[-1]))
        return (value_nM - exact_nV.logsumexp(-1, keepdim=True)).exp().half(), token_nM.int()

    def of(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens, int64 [N, M], and probabilities, fp32 [N, M], of all targets of rows, in order.

        Raises:
            DynloraError: the teacher was not asked about one of them.
        """
        if unknown := [row for row in rows if row not in self._rows]:
            raise DynloraError(
                f"the teacher was never asked about rows {unknown}", "please report this: it is a fault of dynlora"
            )
        if not rows:  # another process has the last rows of the step
            return torch.zeros(0, 1, dtype=torch.long, device=device), torch.zeros(0, 1, device=device)
        with torch.autocast("cpu", enabled=False):  # which knows no fp16
            token_NM, value_NM = (torch.cat(part) for part in zip(*(self._rows[row] for row in rows), strict=True))
        if device.type == "cuda":  # which copies from pinned memory while Python goes on
            token_NM, value_NM = token_NM.pin_memory(), value_NM.pin_memory()
        return token_NM.to(device, non_blocking=True).long(), value_NM.to(device, non_blocking=True).float()

    def shared(self) -> None:
        """Let every process know what the others have found; all call this together."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_world_size() == 1:
            return
        everybody: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everybody, self.state_dict())
        self._rows = {}
        for state in everybody:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: numbers of the rows and of their targets [rows], then all targets [targets, M]."""
        if not self._rows:
            return {}
        told = list(self._rows.values())
        return {
            "teacher.rows": torch.tensor(list(self._rows)),
            "teacher.targets": torch.tensor([len(row.token_nM) for row in told]),
            "teacher.tokens": torch.cat([row.token_nM for row in told]),
            "teacher.probabilities": torch.cat([row.probability_nM for row in told]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Know what a checkpoint knows; what is known already stays."""
        if "teacher.rows" not in state:
            return
        counts = state["teacher.targets"].tolist()
        parts = (state[name].cpu().split(counts) for name in ("teacher.tokens", "teacher.probabilities"))
        for row, *told in zip(state["teacher.rows"].tolist(), *parts, strict=True):
            self._rows.setdefault(row, Row(*told))


class Taught(objective.Objective):
    """Cross-entropy to the rows' targets and to what was told of them.

    Args:
        options: the recipe's `train` section.
        told: of the rows.
        share: of the loss that is to what was told.
    """

    def __init__(self, options: Train, told: Told, share: float) -> None:
        super().__init__(options)
        self.told, self.share = told, share

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.share:  # nobody was asked
            return summed_loss(model, batch)
        token_NM, share_NM = self.told.of(batch.rows, batch.labels.device)
        share_NM *= self.share
        head, states_ND, targets_N, _ = at_targets(model, batch)
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


class Distilled(Taught):
    """An objective whose teacher is the model that the run begins with, reading more than what is trained reads."""

    @abstractmethod
    def lessons(self, examples: Iterable[Example]) -> list[OneText]:
        """What the teacher reads in place of rows: with their numbers, and their targets in the same order."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.told.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.told.load_state_dict(state)


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
