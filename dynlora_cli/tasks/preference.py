"""What objectives over whole answers need: log-probabilities of lines under a model, and under its reference.

The reference of a run is the model that it starts from. Its log-probabilities are computed before the first step and
kept by line, so there is no second model, no reference pass in training, and nothing that training does to the
components (pruning, another basis, training those of `adapter.from`) can change them.

Dimensions: L lines of a batch, P rows (pairs of lines, or judged answers), N targets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dynlora_cli.data.examples import Judge
from dynlora_cli.errors import DynloraError
from dynlora_cli.tasks import objective
from dynlora_cli.tasks.loss import evaluating, target_losses

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.batches import Batch


def sequence_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every line's targets, summed, nats [L]; and how many targets it has [L].

    No logits of the batch are kept: see kernels/linear_cross_entropy.py.
    """
    losses_N, line_N = target_losses(model, batch)
    none_L = losses_N.new_zeros(len(batch.labels))
    return none_L.index_add(0, line_N, -losses_N), none_L.index_add(0, line_N, torch.ones_like(losses_N))


class References:
    """Log-probabilities of lines under the reference, each computed once.

    They are known by the lines' keys, which say what the line is and not where it stands, so a line that comes up
    again, in another epoch or another batch, has the very number that it had before.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def has(self, keys: Iterable[bytes]) -> bool:
        """Whether all of these lines are known."""
        return all(key in self._known for key in keys)

    def learn(self, model: nn.Module, batch: Batch) -> None:
        """Compute what the model, as it is now, says of the lines of a batch; what is known already stays."""
        with evaluating(model):
            logps_L, _ = sequence_logps(model, batch)
        if batch.rows:
            for key, logp in zip(batch.line_keys, logps_L.double().tolist(), strict=True):
                self._known.setdefault(key, logp)

    def of(self, batch: Batch, like: Tensor) -> Tensor:
        """The log-probabilities of a batch's lines, on the device and in the type of a tensor. [L]

        Raises:
            DynloraError: one is not known.
        """
        if not batch.rows:
            return torch.zeros_like(like)
        if not self.has(batch.line_keys):
            raise DynloraError(
                f"the reference was never asked about rows {batch.rows}", "please report this: it is a fault of dynlora"
            )
        found = [self._known[key] for key in batch.line_keys]
        return torch.tensor(found, dtype=torch.float64).to(like.device, like.dtype, non_blocking=True)

    def shared(self) -> None:
        """Let every process know what the others have found; all call this together."""
        if _alone():
            return
        everybody: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everybody, self._known)
        # In the order of processes, so that a line that two of them had is the same number for all.
        self._known = {}
        for known in everybody:
            for key, logp in known.items():
                self._known.setdefault(key, logp)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: keys as bytes [lines, width], and numbers in fp64 [lines]."""
        if not self._known:
            return {}
        keys = torch.frombuffer(bytearray(b"".join(self._known)), dtype=torch.uint8)
        logps = torch.tensor(list(self._known.values()), dtype=torch.float64)
        return {"reference.keys": keys.view(len(logps), -1), "reference.logps": logps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Know what a checkpoint knows."""
        if "reference.keys" in state:
            keys = [bytes(key) for key in state["reference.keys"].cpu().numpy()]
            self._known = dict(zip(keys, state["reference.logps"].cpu().tolist(), strict=True))


class Means:
    """Means of what is found on rows, since they were last taken. Sums stay on the device, in fp64."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums: Tensor | None = None  # of the numbers, and how many there are [2, names]

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Take rows in. [P] each, NaN where a row has none of it"""
        found = torch.stack([numbers[name].detach().double() for name in self.names])
        sums = torch.stack([found.nansum(1), (~found.isnan()).double().sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, total: Callable[..., list[float]]) -> dict[str, float]:
        """The means over all processes, and begin anew.

        Args:
            total: sums numbers over processes; it is called in every process, by all together.
        """
        sums = self.sums if self.sums is not None else torch.zeros(2, len(self.names), dtype=torch.float64)
        self.sums = None
        found = total(*sums.flatten().tolist())
        pairs = zip(self.names, found[: len(self.names)], found[len(self.names) :], strict=True)
        return {name: summed / count for name, summed, count in pairs if count}


class PreferenceObjective(objective.Objective, Judge):
    """An objective whose loss is put together from the log-probabilities of whole answers.

    Attributes:
        needs_reference: the loss compares the model with the one that training begins with.
        measured: what `rows` gives, the loss apart.
    """

    needs_reference: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Train) -> None:
        super().__init__(options)
        self.references = References()
        self.seen = Means(self.measured)
        self._base: Callable[[], AbstractContextManager[Any]] | None = None  # in it the model is its own reference

    @abstractmethod
    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss`, with a gradient, and the numbers of `measured`, without: of every row [P], NaN where it has none."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the rows of a batch, to train on."""
        found = self.rows(model, batch)
        if not batch.rows:  # another process has the last rows of the step; the passes are made together
            return found["loss"].sum() * 0.0
        self.seen.add(found)
        return found["loss"].sum()

    def take(self, total: Callable[..., list[float]]) -> dict[str, float]:
        found = self.seen.take(total)
        if "margin" not in found and {"reward_chosen", "reward_rejected"} <= found.keys():
            found["margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found

    @property
    def tally(self) -> Any:
        return self.seen.sums

    @tally.setter
    def tally(self, tally: Any) -> None:
        self.seen.sums = tally

    def numbers(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss` and the numbers of `measured` for every row. [P], NaN where a row has none of it"""
        found = self.rows(model, batch)
        return {name: number.detach()[: len(batch.rows)] for name, number in found.items()}

    def judged(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For every row [P]: its loss, whether the model ranks it as the row says (1 or 0), the 1, and its number."""
        found = self.numbers(model, batch)
        right_P = found["accuracy"].long()
        return found["loss"], right_P, torch.ones_like(right_P), torch.arange(len(right_P), device=right_P.device)

    # -- the reference -------------------------------------------------------------------------------------------------

    def bind(self, base: Callable[[], AbstractContextManager[Any]]) -> None:
        """Learn how a run's model is made its own reference, for rows that `remember` has not been shown."""
        self._base = base

    def remember(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take the model as it is now for the reference on these rows. All processes call this together.

        Args:
            model: in any mode; its dropout is off meanwhile.
            batches: on its device, as many in every process.
            autocast: makes the context of the forward passes.
        """
        for batch in batches:
            with autocast():
                self.references.learn(model, batch)
        self.references.shared()

    def reference_logps(self, model: nn.Module, batch: Batch, like: Tensor) -> Tensor:
        """What the reference says of a batch's lines. [L]

        Raises:
            DynloraError: it was not asked before, and cannot be asked any more.
        """
        if self._base is not None and not self.references.has(batch.line_keys):
            with self._base():
                self.references.learn(model, batch)
        return self.references.of(batch, like)

    def state_dict(self) -> dict[str, Tensor]:
        return self.references.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.references.load_state_dict(state)


def above(one: Tensor, other: Tensor | float) -> Tensor:
    """1 where a number is above another, 0 where it is below; a half where they are equal, as before the first step."""
    return 0.5 + 0.5 * (one - other).sign()


def summed_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes of a run, which all ask for it together."""
    if not _alone():
        torch.distributed.all_reduce(tensor)
    return tensor


def _alone() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_world_size() == 1
