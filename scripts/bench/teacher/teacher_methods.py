"""The methods of teacher.py: one run of each, on the grounds of quality.py (same rows, batches, schedule, loop).

A method is a name and settings: `distil k=0.7 fade=1 pruning.start=0.5`. Settings with a dot are the recipe's; the
others say what the teacher is:

    k       share of the loss that is the cross-entropy to the teacher's probabilities (temperature 1)
    kind    before   components as they were before the first event (the default; no run beside it)
            latest   taken anew before every event
            whole    an unpruned run, `wide` times the budget (2 as ours begins), trained to its end first, its rate
                     lower by the root of how much wider it is than ours begins; there from the first step
            heal     the unpruned run of `whole`, of 200 steps, was trained anyway: its components are cut to the budget
                     in their SVD basis after the first step, and what is left is healed under it, as `dynlora prune
                     --heal` does without a teacher; `rate` is the healing's, and `at` that of the unpruned run
    fade    1: k falls linearly to 0, from where the teacher comes in to the end of the run
    every   the teacher is asked at every n-th step only
    until   share of the run after which the teacher is not asked any more

and `rows=240` that there are no more rows to learn from, so that a run goes over them several times.

`flat` is a plain LoRA of ours (no pruning); with a teacher it is "LoRA with the same teacher".
CPU seconds are of the training loop alone; those of the teacher (its passes, its run) are counted beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import quality_methods
import torch
from quality_methods import Ground, Job, Result, _result, lay_ground, lora_config, rival
from quality_tasks import base_name
from torch import Tensor, nn

from dynlora_cli.data.batches import Batch
from dynlora_cli.errors import MeasureError
from dynlora_cli.execution.mode import plan
from dynlora_cli.kernels.linear_cross_entropy import ending, linear_losses
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.tasks.loss import at_targets, summed_loss
from dynlora_cli.tasks.objective import Objective
from dynlora_cli.training import loop
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.components import attach
from dynlora_cli.training.run import Run
from dynlora_cli.training.setup import make_accelerator, make_run

Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Teaching:
    """How a run is taught; see the head of this file."""

    k: float = 0.0
    kind: str = "before"
    fade: int = 0
    every: int = 1
    until: float = 1.0
    rows: int = 0
    wide: int = 2
    at: float = 0.0

    @classmethod
    def of(cls, method: str) -> Teaching:
        found = dict(part.split("=", 1) for part in method.split()[1:] if "." not in part.split("=")[0])
        return cls(**{key: type(getattr(cls, key))(value) for key, value in found.items()})


def recipe_settings(method: str) -> tuple[str, ...]:
    """Those of the method's settings that are the recipe's."""
    return tuple(part for part in method.split()[1:] if "." in part.split("=")[0])


quality_methods.settings_of = recipe_settings  # quality.py's grounds, with the settings that are the teacher's left out


@dataclass
class Distilling(Objective):
    """(1-k) cross-entropy + k cross-entropy to the teacher: the gradient of (1-k) CE + k KL(teacher || student)."""

    pool: Pool
    teaching: Teaching
    steps: int
    taught: Factors | None = None
    since: int = 0  # the step at which the teacher came in
    step: int = 0  # of the run, done
    seconds: float = 0.0  # CPU, of the teacher's passes
    asked: int = field(default=0)

    def share(self) -> float:
        """k of the step in hand."""
        teaching = self.teaching
        if self.taught is None or self.step >= teaching.until * self.steps or self.step % teaching.every:
            return 0.0
        left = (self.steps - self.step) / max(1, self.steps - self.since)
        return teaching.k * (left if teaching.fade else 1.0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        k = self.share()
        if not k:
            return summed_loss(model, batch)
        assert self.taught is not None
        started = time.process_time()
        with torch.no_grad(), as_if(self.pool.layers.values(), self.taught):
            head, told_ND, _, _ = at_targets(model, batch)
            assert head is not None
        self.seconds += time.process_time() - started
        self.asked += 1
        place = 0

        def judge(logits_nV: Tensor, targets_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            nonlocal place
            here = time.process_time()
            q_nV = head(told_ND[place : place + len(targets_n)]).softmax(-1)
            place += len(targets_n)
            self.seconds += time.process_time() - here
            return mixed(logits_nV, targets_n, q_nV, k, dtype)

        head, states_ND, targets_N, _ = at_targets(model, batch)
        assert head is not None
        assert ending(model).judge is None
        return linear_losses(states_ND, targets_N, head, judge).sum()


def mixed(logits_nV: Tensor, targets_n: Tensor, q_nV: Tensor, k: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss [n] and its gradient for the logits [n, V]; of the loss, KL without the entropy of q, which is constant."""
    place = targets_n[:, None]
    log_nV = logits_nV.log_softmax(-1)
    loss_n = -(1 - k) * log_nV.gather(1, place)[:, 0] - k * torch.linalg.vecdot(q_nV, log_nV)
    grad_nV = log_nV.exp_().sub_(q_nV, alpha=k)
    grad_nV.scatter_add_(1, place, grad_nV.new_full(place.shape, k - 1.0))
    return loss_n, grad_nV.to(dtype)


def factors_of(pool: Pool) -> Factors:
    return [(a.detach().clone(), b.detach().clone()) for a, b in (layer.factors() for layer in pool.layers.values())]


@contextmanager
def as_if(layers: Any, factors: Factors) -> Iterator[None]:
    """The layers answer with other factors; no gradient."""
    layers = list(layers)
    kept = [(layer._parameters["a_CI"], layer._parameters["b_OC"]) for layer in layers]
    for layer, (a, b) in zip(layers, factors, strict=True):
        put(layer, nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False))
    try:
        yield
    finally:
        for layer, (a, b) in zip(layers, kept, strict=True):
            put(layer, a, b)


def put(layer: ComponentLinear, a: nn.Parameter, b: nn.Parameter) -> None:
    layer._parameters["a_CI"], layer._parameters["b_OC"] = a, b


def train(ground: Ground, teaching: Teaching, taught: Factors | None = None) -> tuple[Result, Pool]:
    """A run of ours with a teacher; `taught`: there from the first step; where it heals, it begins as that."""
    recipe = ground.recipe
    pool, start = attach(ground.base, recipe.adapter, recipe.rank, recipe.seed)
    assert isinstance(pool, Pool)
    if teaching.kind == "heal":
        assert taught is not None
        for mine, theirs in zip(pool.views(pool.values.detach()), taught, strict=True):
            mine[0].copy_(theirs[0])
            mine[1].copy_(theirs[1])
    modes = plan(recipe.train)
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    modes.apply(ground.base.model, pool)
    run = make_run(
        recipe, accelerator, ground.base, replace(ground.data, val=[]), pool, start, modes, save=lambda _: None
    )
    run.control.loss_now = None  # type: ignore[union-attr]
    objective = Distilling(pool, teaching, run.total_steps, taught)
    run.objective = objective
    watch(run, objective)
    started, wall = time.process_time(), time.perf_counter()
    loop.fit(run)
    cpu, seconds = time.process_time() - started, time.perf_counter() - wall
    result = _result(ground.base.model, ground, pool.parameters, seconds)
    if objective.taught is not None:
        with as_if(pool.layers.values(), objective.taught):
            result["teacher_loss"] = _result(ground.base.model, ground, pool.parameters, seconds)["loss"]
    more = {"cpu": cpu, "teacher_cpu": objective.seconds, "asked": objective.asked, "since": objective.since}
    return result | {key: round(value, 3) for key, value in more.items()}, pool


def watch(run: Run, objective: Distilling) -> None:
    """Take the components before the event that makes them a teacher."""
    control, kind = run.control, objective.teaching.kind
    schedule, apply = control.schedule, control.apply

    def watched(step: int) -> Any:
        first = objective.taught is None
        if objective.teaching.k and step in schedule.steps and (kind == "latest" or (kind == "before" and first)):
            objective.taught = factors_of(run.trained)  # type: ignore[arg-type]
            objective.since = step if first else objective.since
        objective.step = step
        return apply(step)

    control.apply = watched  # type: ignore[method-assign]


def dynlora(job: Job, ground: Ground, work: Path) -> Result:
    """Ours; `flat` is ours that begins at its budget and keeps it."""
    teaching, taught, before = Teaching.of(job.method), None, 0.0
    if teaching.kind == "whole":
        taught, before = whole(job, work)
    if teaching.kind == "heal":  # its run counts for nothing: both sides have it
        taught, _ = whole(replace(job, task=base_name(job.task), rate=teaching.at * (teaching.wide / 2) ** 0.5), work)
    result, _ = train(ground, teaching, taught)
    return result | {"before_cpu": round(before, 3)}


def whole(job: Job, work: Path) -> tuple[Factors, float]:
    """The teacher that is trained to its end first, never pruned; and its CPU seconds. Kept in the work folder."""
    teaching = Teaching.of(job.method)
    wide, rate = teaching.wide * job.budget, job.rate * (2 / teaching.wide) ** 0.5
    rows = teaching.rows if teaching.kind == "whole" else 0  # whoever heals may have few rows of what was learned from
    kept = work / f"{job.task}-{wide}-{rate:.3e}-{job.seed}-{rows}.pt"
    if not kept.exists():
        ground = lay_ground(Job(job.task, f"flat rank.init={wide}", wide, rate, job.seed), work, [])
        result, pool = train(few_rows(ground, rows), Teaching())
        torch.save((factors_of(pool), result["cpu"], result["loss"]), kept)
    factors, cpu, _ = torch.load(kept)
    return factors, cpu


def lora(job: Job, ground: Ground, work: Path) -> Result:  # noqa: ARG001
    """Stock PEFT."""
    started = time.process_time()
    result = rival(job, ground, lora_config)
    return result | {"cpu": round(time.process_time() - started, 3)}  # its held-out rows counted in


def few_rows(ground: Ground, rows: int) -> Ground:
    """The same ground with the first rows alone; 0: with all."""
    if not rows:
        return ground
    data = replace(ground.data, train=ground.data.train[:rows])
    return replace(ground, data=data, train=make_batches(ground.recipe, data.train, ground.base, shuffle=True))


# A cut in the SVD basis, whose components go after the first step; the rate stays as it is given.
HEAL = " rank.init={} pruning.policy=magnitude pruning.start=0 pruning.end=0.01 pruning.events=1 pruning.lr_coupling=0"
METHODS = {"ours": dynlora, "flat": dynlora, "lora": lora}


def run(job: Job, work: Path) -> Result:
    torch.manual_seed(job.seed)
    name, teaching = job.method.split()[0], Teaching.of(job.method)
    more = {"flat": f" rank.init={job.budget}", "heal": HEAL.format(teaching.wide * job.budget)}
    laid = replace(job, method=job.method + more.get(teaching.kind, more.get(name, "")))
    try:
        ground = few_rows(lay_ground(laid, work, []), teaching.rows)
        return METHODS[name](job, ground, work)
    except MeasureError:
        return {"loss": float("inf")}
