"""Rank control as a callback of transformers' Trainer, and so of TRL's and sentence-transformers' trainers.

on_train_begin           the schedule, from the trainer's own number of steps
on_step_begin            from `start` to `end`, hooks gather the gradient
on_pre_optimizer_step    the policy sees it, and the components' learning rate is raised
on_optimizer_step        the rate is put back
on_step_end              at an event components go: layers, optimizer and moments together
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.state import GradientState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora_cli import plugins
from dynlora_cli.errors import DynloraError, MeasureError, UsageError
from dynlora_cli.pruning.control import RankControl
from dynlora_cli.pruning.schedule import SHORTEST, Schedule
from dynlora_cli.trainers.attached import Attached, attached_to
from dynlora_cli.trainers.distributed import Processes
from dynlora_cli.trainers.gradients import FlatGradient, Targets
from dynlora_cli.trainers.leaves import forget_leaves, on_flat, refuse_unknown, replace_leaves, tie
from dynlora_cli.trainers.rates import CoupledRate
from dynlora_cli.trainers.settings import checked
from dynlora_cli.trainers.surroundings import refuse_arguments, refuse_model, refuse_optimizer

if TYPE_CHECKING:
    from dynlora_cli.pruning.policy import Policy

log = logging.getLogger(__name__)
EVENT = "rank_event"  # the key of an event in a trainer's log history


class DynamicRankCallback(TrainerCallback):
    """Prunes the components of a model while a trainer trains it.

    Args:
        of: what `attach` returned, or the model that it was called with.
        start, end, events, lr_coupling, gauge: as in the section `pruning` of a recipe; times are shares of all
            optimizer steps. A policy's own keys are taken as well.

    Attributes:
        rank_events: the events so far, also those before a checkpoint that training went on from.

    Raises:
        UsageError: the model has no components, or a value is wrong.
    """

    def __init__(
        self,
        of: Attached | nn.Module,
        *,
        start: float | str = "auto",
        end: float | str = "auto",
        events: int | str = "auto",
        lr_coupling: float = 0.5,
        gauge: bool = True,
        **of_policy: Any,
    ) -> None:
        self.attached = attached_to(of)
        recipe = self.attached.recipe
        pruning = {
            "policy": recipe.pruning.policy, "start": start, "end": end, "events": events, "lr_coupling": lr_coupling,
            "gauge": gauge, **of_policy,
        }  # fmt: skip
        sections = {"adapter": recipe.adapter.model_dump(), "rank": recipe.rank.model_dump(), "pruning": pruning}
        self.attached.recipe = checked(sections, task=recipe.model.task, seed=recipe.seed, where="DynamicRankCallback")
        self.rank_events: list[dict[str, Any]] = []
        self.control: RankControl | None = None
        self._processes: Processes | None = None
        self._targets: Targets | None = None
        self._at_work, self._rate = False, 0.0

    # -- a training run ------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        refuse_arguments(args)
        refuse_model(self.attached, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        attached = self.attached
        refuse_arguments(args)
        refuse_model(attached, model)
        if getattr(attached.training, "_state", None) is state and attached.training is not self:
            raise UsageError("two DynamicRankCallbacks prune the same components", "give the trainer one")
        self.release()
        self._state, self._outer_optimizer = state, optimizer
        self._optimizer = refuse_optimizer(attached, optimizer)
        self._rates, self._checked = CoupledRate(self._optimizer), False
        self._gradient = FlatGradient(attached.pool, GradientState())
        self._processes, self._at_work = Processes(attached.model), True
        tie(attached.pool)
        attached.saved.root = model
        if state.global_step > 0 and attached.saved.found is None:  # the trainer has read the adapter alone
            attached.saved.read(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")
        self._plan(state)
        history: list[dict[str, Any]] = state.log_history  # transformers says that all its values are numbers
        self.rank_events = [entry[EVENT] for entry in history if EVENT in entry]
        attached.training = self
        attached.saved.control, attached.saved.resized = self._control().state_dict, self._follow
        attached.pool.stand_after(state.global_step, state.max_steps)

    def _plan(self, state: TrainerState) -> None:
        """The schedule of the run, and what a checkpoint knows of rank control."""
        pool, start, recipe = self.attached.pool, self.attached.start, self.attached.recipe
        goes_on = state.global_step > 0
        if not goes_on:
            self.attached.saved.found = None  # read before, for another end
        found = self.attached.saved.take()
        if goes_on and found is None:
            raise UsageError(
                f"the trainer goes on at step {state.global_step} with a checkpoint that holds no rank control",
                "resume from a checkpoint in the trainer's output_dir, which a DynamicRankCallback was there to write",
            )
        begin, end = recipe.pruning_window
        parameters = start.parameters if goes_on else pool.parameters
        schedule = Schedule.plan(
            total_steps=state.max_steps,
            start=begin,
            end=end,
            events=recipe.pruning.events,
            parameters=parameters,
            budget=start.budget,
        )
        if state.max_steps < SHORTEST and parameters > start.budget:
            log.warning("%d steps are too few to prune (at least %d): all components stay", state.max_steps, SHORTEST)
        self.control = RankControl(
            pool,
            self._optimizer,
            cast("Policy", plugins.load("policies", recipe.pruning.policy)),
            schedule,
            options=recipe.pruning,
            seed=recipe.seed,
            gauge=recipe.pruning.gauge,
            lr_coupling=recipe.pruning.lr_coupling,
        )
        if found is not None and goes_on:
            device = pool.values.device
            self.control.load_state_dict(
                {key: value if value.dtype == torch.uint8 else value.to(device) for key, value in found.items()}
            )

    def _control(self) -> RankControl:
        assert self.control is not None
        return self.control

    def _looks(self, step: int) -> bool:
        schedule = self._control().schedule
        return schedule.begin < step <= schedule.last

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._only_small_ones_are_best(state)
        number = state.global_step + 1
        self.attached.pool.begin_step(number, state.max_steps)
        if not self._looks(number):
            self._look_away()
            return
        self._gradient.begin()
        self._targets = self._targets or Targets(self.attached.model)
        self._targets.begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._only_small_ones_are_best(state)

    def _only_small_ones_are_best(self, state: TrainerState) -> None:
        """The best checkpoint is one that meets the budget, or the run would end with more than was asked for."""
        if not self._control().budget_met:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _look_away(self) -> None:
        self._gradient.end()
        if self._targets is not None:
            self._targets.end()
            self._targets = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        number = state.global_step + 1
        if self._looks(number) and self._targets is not None:
            self._observe(number, self._targets)
        self._rates.raised(self.attached.pool.leaves, self._control().rate_factor)

    def _observe(self, number: int, targets: Targets) -> None:
        gradient_P, processes = self.attached.pool.values.grad, self._processes
        assert gradient_P is not None
        assert processes is not None
        processes.average(gradient_P)
        count = targets.count
        if targets.given is None:  # of this process alone
            count = processes.total(torch.tensor(count, device=gradient_P.device)).item()
        scaler = getattr(self._outer_optimizer, "scaler", None)
        if scaler is not None:
            gradient_P.div_(scaler.get_scale())
        if gradient_P.isfinite().all():
            with self._gradient.in_leaves():
                self._control().observe(number, count, processes.total)
        else:  # fp16 overflowed, and the scaler will skip this step
            self._control().skip()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pool, skipped = self.attached.pool, getattr(self._outer_optimizer, "step_was_skipped", False)
        self._rate = self._rates.rate(pool.leaves)
        self._rates.lower()
        pool.after_update(0.0 if skipped else self._rate)
        if not self._checked and self._control().schedule.steps:
            refuse_unknown(self._optimizer, pool.leaves)
            self._checked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        rank, step = self._control(), state.global_step
        if step not in rank.schedule.steps and step != rank.schedule.begin:
            return
        event = self._change(step)
        if event is not None:
            self.rank_events.append(event)
            history: list[dict[str, Any]] = state.log_history
            history.append({EVENT: event, "epoch": state.epoch, "step": step})

    def _change(self, step: int) -> dict[str, Any] | None:
        """Do what the schedule has for the step just done."""
        pool, rank = self.attached.pool, self._control()
        self._gradient.end()  # its hooks are on leaves that go
        self._refuse_graphs()
        if not pool.values.isfinite().all():
            raise MeasureError(f"after step {step} components hold NaN or infinity", "lower the learning rate")
        tie(pool)

        def act(stand_in: torch.optim.Optimizer) -> dict[str, Any] | None:
            rank.optimizer = stand_in
            try:
                return rank.apply(step)
            finally:
                rank.optimizer = self._optimizer

        old = pool.leaves
        event = on_flat(pool, self._optimizer, act)
        if pool.leaves[0] is not old[0]:
            assert self._processes is not None
            self._processes.after_event(pool)
        return event

    def _refuse_graphs(self) -> None:
        """
        Raises:
            DynloraError: a graph through the components is alive, whose backward pass is still to come.
        """
        if self.attached.pool.graphs:
            gc.collect()  # a graph in a cycle of references is nobody's
        if self.attached.pool.graphs:
            raise DynloraError(
                "components cannot go after this step: somebody still holds a loss or an output with its graph",
                "keep `loss.detach()` instead, in the trainer's own code or another callback",
            )

    def _follow(self, old: list[nn.Parameter]) -> None:
        """The pool has taken on the shapes of a checkpoint: let the optimizer step what there is now."""
        replace_leaves(self._optimizer, old, self.attached.pool.leaves)
        forget_leaves(self._optimizer, old)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs or self.control is None:
            return
        alive = {
            "components": self.attached.components,
            "component_parameters": self.attached.parameters,
            "component_learning_rate": self._rate,  # of the step just done, as `learning_rate` is
        }
        logs |= alive
        if state.log_history:
            state.log_history[-1] |= alive

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the model: take off all hooks. A trainer that ends in an error does not say so."""
        if self._at_work:
            self._look_away()
            self._rates.lower()
            self._at_work = False
        if self._processes is not None:
            self._processes.remove()
            self._processes = None
        if self.attached.training is self:
            self.attached.training = self.attached.saved.control = None
