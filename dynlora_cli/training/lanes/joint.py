"""One forward and one backward pass for the micro-batches of several runs.

A model of its own on the shared weights, in which every layer that any run adapts is a `LaneLinear`. The loss is the
sum of the runs' losses: no run's loss depends on the components of another, so its gradient is each run's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from dynlora_cli.data.batches import Batch
from dynlora_cli.execution.mode import plan
from dynlora_cli.tasks.loss import target_losses
from dynlora_cli.training.lanes.batch import joined, together, width_of
from dynlora_cli.training.lanes.layer import LaneLinear, Places, Rows
from dynlora_cli.training.step import backward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.pool import Pool
    from dynlora_cli.training.run import Run


class Asked(NamedTuple):
    """What one run waits for: the gradient of a micro-batch, whose loss is divided by `supervised`."""

    lane: int
    run: Run
    batch: Batch
    supervised: float


class Joint:
    """Computes what runs ask for, together where that can be done.

    Args:
        model: on the shared weights, without components; changed in place.
        runs: all of them, by number, before their first step. Their modes are alike.
    """

    def __init__(self, model: PreTrainedModel, runs: Mapping[int, Run]) -> None:
        self.model, self.places = model, Places()
        self.modes = plan(next(iter(runs.values())).recipe.train)
        self.modes.prepare(model)
        pools = {lane: cast("Pool", run.trained) for lane, run in runs.items()}
        self.lanes: Set[int] = set(runs)
        self.layers: list[LaneLinear] = []
        for name in dict.fromkeys(name for pool in pools.values() for name in pool.layers):
            layers = {lane: pool.layers[name] for lane, pool in pools.items() if name in pool.layers}
            parent, _, leaf = name.rpartition(".")
            self.layers.append(LaneLinear(name, model.get_submodule(name), layers, self.places))
            setattr(model.get_submodule(parent), leaf, self.layers[-1])
        model.train()

    def keep(self, lanes: Set[int]) -> None:
        """Forget the components of all runs but these."""
        if lanes != self.lanes:
            self.lanes = lanes
            for layer in self.layers:
                layer.layers = {lane: own for lane, own in layer.layers.items() if lane in lanes}

    def answer(self, asked: Sequence[Asked]) -> list[Tensor | Exception]:
        """Add the gradients that runs wait for.

        Returns:
            For each run its share of the loss, as `step.backward` returns it; or what went wrong.
        """
        found: dict[int, Tensor | Exception] = {}
        for group in together([each.batch for each in asked]):
            members = [asked[place] for place in group]
            try:
                losses = self._pass(members) if len(members) > 1 else [_alone(members[0])]
                found |= dict(zip(group, losses, strict=True))
            except Exception as error:  # memory is full, say; each of these runs ends by it, and the others go on
                found |= dict.fromkeys(group, error)
        return [found[place] for place in range(len(asked))]

    def _pass(self, asked: Sequence[Asked]) -> list[Tensor]:
        """It is a function of its own so that the autograd graph is freed when it returns."""
        accelerator = asked[0].run.accelerator
        batch = joined([each.batch for each in asked]).to(accelerator.device)
        with self._placed(asked), accelerator.autocast(), cast_copies([each.run for each in asked]):
            losses_N, _ = target_losses(self.model, batch)
            own = losses_N.split([_targets(each.batch) for each in asked])
            losses = [part.sum() / each.supervised for part, each in zip(own, asked, strict=True)]
            scalers = [each.run.accelerator.scaler for each in asked]
            scaled = [loss if by is None else by.scale(loss) for loss, by in zip(losses, scalers, strict=True)]
        with self._placed(asked):  # gradient checkpointing runs the blocks again
            sum(scaled[1:], scaled[0]).backward()
        return [loss.detach().double() for loss in losses]

    @contextmanager
    def _placed(self, asked: Sequence[Asked]) -> Iterator[None]:
        """The layers know whose rows are where."""
        start, rows = 0, []
        for each in asked:
            stop = start + len(each.batch.labels)
            rows.append(Rows(each.lane, start, stop, width_of(each.batch), each.run.random))
            start = stop
        self.places.rows, self.places.width = rows, max(one.width for one in rows)
        try:
            yield
        finally:
            self.places.rows = []

    def close(self) -> None:
        """Let go of the model."""
        self.modes.close()


def _alone(asked: Asked) -> Tensor:
    """The pass that a run would make by itself, on its own model."""
    with asked.run.random.exchanged():
        return backward(asked.run, asked.batch, asked.supervised)


@contextmanager
def cast_copies(runs: Sequence[Run]) -> Iterator[None]:
    """Inside the block the components of these runs are there in autocast's dtype, cast at once."""
    pools = [cast("Pool", run.trained) for run in runs]
    for pool in pools:
        pool.cast_copies()
    try:
        yield
    finally:
        for pool in pools:
            pool.forget_copies()


def _targets(batch: Batch) -> int:
    assert batch.places is not None
    return len(batch.places)
