"""Rank control: one budget for all layers, met by removing components while training.

A pruning event, from its beginning to its end:

    schedule       when it is, and how many numbers may be alive after it             schedule.py
    scores         what each component is worth, by the policy and what it observed    policy.py, policies/
    select_K       which components stay: one threshold over all layers                select.py
    early stopping may refuse the event, where the budget is open                      stopping.py
    shrink         removes the others: layers, optimizer and moments together          lora/surgery.py
    gauge          turns what is left into its SVD basis                               lora/svd_basis.py

Dimensions: K components of the pool.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.svd_basis import to_svd_basis
from dynlora_cli.pruning.policy import Observer, Policy, observer_of, scores_of
from dynlora_cli.pruning.schedule import Schedule
from dynlora_cli.pruning.select import select_K
from dynlora_cli.pruning.signals import GateGradients

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.pruning.stopping import EarlyStopping


class RankControl:
    """Meets the budget on schedule: `observe` after every backward, `apply` after every optimizer step.

    Args:
        pool: the components.
        optimizer: steps `pool.values`.
        policy: a file of policies/; scores the components.
        schedule: when and how far.
        options: the section `pruning` of the recipe, for the policy's own keys.
        seed: of the policy's random numbers.
        gauge: turn the components into their SVD basis after each event.
        lr_coupling: exponent of (parameters at the start / alive) in `rate_factor`.
        loss_now: measures the loss on a few fixed rows, before and after each event; None: it is not measured.
        stopping: may refuse events and end the pruning; None: the schedule is met.
    """

    def __init__(
        self,
        pool: Pool,
        optimizer: torch.optim.Optimizer,
        policy: Policy,
        schedule: Schedule,
        *,
        options: Any = None,
        seed: int = 0,
        gauge: bool = True,
        lr_coupling: float = 0.0,
        loss_now: Callable[[], float] | None = None,
        stopping: EarlyStopping | None = None,
    ) -> None:
        self.pool, self.optimizer, self.policy, self.schedule = pool, optimizer, policy, schedule
        self.gauge, self.lr_coupling, self.loss_now, self.stopping = gauge, lr_coupling, loss_now, stopping
        self.start_parameters = pool.parameters
        self.observer = observer_of(policy, options, training=True)
        # For the predicted change of the loss in every event, which needs gate gradients whatever the policy looks at.
        self.gradients = self.observer if isinstance(self.observer, GateGradients) else GateGradients()
        own = [self.observer] if self.observer and self.observer is not self.gradients else []
        self.observers: list[Observer] = [self.gradients, *own]
        assert len({each.name for each in self.observers}) == len(self.observers), "names are keys in checkpoints"
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied by: with s constant, the best rate rises as components go."""
        return (self.start_parameters / self.pool.parameters) ** self.lr_coupling

    @property
    def ended(self) -> bool:
        """Whether early stopping has ended the pruning."""
        return self.stopping is not None and self.stopping.ended

    @property
    def budget_met(self) -> bool:
        """Whether no further component will go."""
        if self.ended:
            return True
        return not self.schedule.steps or self.pool.parameters <= self.schedule.targets[-1]

    def next_change(self, step: int) -> float:
        """The optimizer step, from `step` on, after which components may go; infinite where none will."""
        if self.ended:
            return math.inf
        return min((at for at in self.schedule.steps if at >= step), default=math.inf)

    def _looks(self, step: int) -> bool:
        return self.schedule.begin < step <= self.schedule.last and not self.ended

    def watches(self, step: int) -> bool:
        """Whether the policy wants to be around the passes of this optimizer step."""
        return self.observer is not None and self.observer.watches_training and self._looks(step)

    def watching(self, batch: Batch, divisor: float) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch, if the policy `watches` this step.

        Args:
            batch: passes through the model.
            divisor: the loss that is passed back is the sum over the batch's targets divided by this.
        """
        assert self.observer is not None
        return self.observer.watching(self.pool, batch, divisor=divisor)

    def observe(
        self, step: int, targets: float = 1.0, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        """Look at the gradient of optimizer step `step` (from 1): accumulated, normalised, reduced, not yet clipped.

        Args:
            targets: supervised tokens (or rows) that the gradient is the mean of.
            reduce: sums a tensor over processes, in place.
        """
        if self._looks(step):
            for observer in self.observers:
                observer.gather(reduce)
                observer.observe(self.pool, targets)

    def skip(self) -> None:
        """The gradient of the step overflowed: nothing of it counts."""
        for observer in self.observers:
            observer.skip()

    def apply(self, step: int) -> dict[str, Any] | None:
        """Do what the schedule has for optimizer step `step`, just done; the event as data, if there was one."""
        started = time.perf_counter()
        if self.ended:
            return None
        if step in self.schedule.steps:
            event = self._prune(step, self._target(step))
        elif self.schedule.steps and step == self.schedule.begin and self.gauge and self._turn():
            event = {"event": "gauge"}  # the scores are collected in this basis from here on
        else:
            return None
        alive = {
            "components": self.pool.components,
            "parameters": self.pool.parameters,
            "ranks": dict(self.pool.counts),
        }
        return {**event, "step": step, **alive, "seconds": time.perf_counter() - started}

    def _target(self, step: int) -> int:
        """Numbers that may be alive after the event of this step."""
        floor = self.schedule.targets[-1]
        if self.stopping is None:
            return self.schedule.targets[self.schedule.steps.index(step)]
        # Every event removes the same share of what is alive; after a refusal half of that share.
        gone = 1 - (floor / self.start_parameters) ** (1 / len(self.schedule.steps))
        return max(floor, math.floor((1 - gone / (1 + self.stopping.refused)) * self.pool.parameters))

    def _turn(self) -> int:
        """Rewrite the components in their SVD basis, and forget the averages: they were of other components."""
        turned = to_svd_basis(self.pool, self.optimizer)
        if turned:
            for observer in self.observers:
                observer.restart()
        return turned

    def scores_K(self) -> Tensor:
        """What the policy thinks of the components now. [K]"""
        return scores_of(self.policy, self.pool, self.observer, self.generator)

    def _prune(self, step: int, target: int) -> dict[str, Any]:
        pool = self.pool
        event: dict[str, Any] = {
            "event": "prune",
            "target_parameters": target,
            "components_before": pool.components,
            "parameters_before": pool.parameters,
        }
        counts, loss = dict(pool.counts), self.loss_now() if self.loss_now else None
        if self.gauge and self.observer is None:  # the policy judges the components as they stand
            self._turn()
        scores_K = pool.ranked(self.scores_K())
        # A cap keeps one noisy event from emptying a layer. Early stopping needs no cap: it measures the harm.
        capped = step != self.schedule.last and self.stopping is None
        keep_K, event["threshold"] = select_K(scores_K, pool.costs_K(), pool.layers_K(), target, capped=capped)
        if self.stopping and not self._allowed(step, keep_K, event):
            return event
        event["predicted_loss_change"] = self.gradients.predicted_loss_change(~keep_K, pool)
        for observer in self.observers:
            observer.select(pool, keep_K)
        shrink(pool, self.optimizer, keep_K)
        if self.gauge:
            self._turn()
        event["removed"] = {name: n - pool.counts[name] for name, n in counts.items() if n > pool.counts[name]}
        if self.stopping is None:
            event["measured_loss_change"] = None if loss is None or self.loss_now is None else self.loss_now() - loss
        return event

    def _allowed(self, step: int, keep_K: Tensor, event: dict[str, Any]) -> bool:
        """Whether early stopping lets the other components go; what it measured is put into the event."""
        assert self.stopping is not None
        before = self.stopping.measure()
        with self.pool.masked(keep_K):
            after = self.stopping.measure()
        allowed, change = self.stopping.allows(before, after)
        self.stopping.ended |= step == self.schedule.last
        event |= {"event": "prune" if allowed else "refused", "ended": self.stopping.ended}
        event["held_out_loss"], event["measured_loss_change"] = before.loss, change
        return allowed

    def state_dict(self) -> dict[str, Tensor]:
        """The averages and the generator, for a checkpoint; tensors only."""
        seen = {
            f"{observer.name}.{key}": tensor
            for observer in self.observers
            for key, tensor in observer.state_dict().items()
        }
        return {
            **seen,
            "generator": self.generator.get_state(),
            "start_parameters": torch.tensor(self.start_parameters),
            "survivors": torch.cat([layer.survivors_C for layer in self.pool.layers.values()]),
            # "brake" is what version 0.1 called early stopping; its checkpoints still load.
            "brake": torch.tensor(self.stopping.state() if self.stopping else (0.0, 0.0, 0.0), dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`; the pool must hold the same components."""
        for observer in self.observers:
            prefix = f"{observer.name}."
            observer.load_state_dict(
                {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            )
        self.generator.set_state(state["generator"])
        self.start_parameters = int(state["start_parameters"])
        self.pool.survive(state["survivors"].cpu().split(list(self.pool.counts.values())))
        if self.stopping:
            self.stopping.go_on(*state["brake"].tolist())


class NoControl:
    """Stands in for a `RankControl` where no component ever goes."""

    schedule = Schedule(0, (), ())
    rate_factor = 1.0
    budget_met = True

    def next_change(self, step: int) -> float:  # noqa: ARG002
        return math.inf

    def watches(self, step: int) -> bool:  # noqa: ARG002
        return False

    def watching(self, batch: Batch, divisor: float) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def observe(self, step: int, targets: float = 1.0, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        pass

    def skip(self) -> None:
        pass

    def apply(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


Control = RankControl | NoControl
