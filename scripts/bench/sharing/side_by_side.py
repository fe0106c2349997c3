"""Train many runs at once on one frozen base: forms and rates side by side, on the same batches of one seed.

The rows of a batch are repeated for every run, and each layer applies to them what their run has learned. Loss, clipping, schedule
and AdamW are those of quality_methods.py's loop for its rivals, for each run apart; tests hold this against stock PEFT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import quality_methods as methods
import torch
from shared_layers import FORMS, Runs, attach
from torch import Tensor, nn

from dynlora_cli.data.batches import Batch
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training.lr_schedule import rate_share

GRADIENT_BATCHES = 8
Record = dict[str, Any]


def train(task: str, rank: int, wanted: Mapping[str, Sequence[float]], seed: int, work: Path) -> list[Record]:
    """One run of every form at each of its rates.

    Args:
        wanted: rates by form.

    Returns:
        lines as quality.py writes them, with the share of each run in the CPU seconds of all.
    """
    begun = time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    ground = methods.lay_ground(methods.Job(task, "lora", rank, 1e-3, seed), work, [])
    model, options = ground.base.model, ground.recipe.train
    targets, _ = methods.plan_ranks(ground.recipe.adapter, ground.recipe.rank, ground.base)
    model.train()
    need = any(FORMS[name].gamma for name in wanted)
    gradients = first_gradients(model, targets, ground.train) if need else None
    groups = [Runs(FORMS[name], rank, rates, targets, seed, gradients) for name, rates in wanted.items()]
    attach(model, targets, groups)
    count = sum(map(len, wanted.values()))
    for done in range(options.max_steps):
        epoch, index = divmod(done, ground.train.steps_per_epoch)
        (batch,) = ground.train.step(epoch, index)
        (summed_loss(model, repeated(batch, count)) / batch.supervised).backward()
        for group in groups:
            share = rate_share(done + 1, options.max_steps, options)
            group.step(done + 1, share, options.weight_decay, options.max_grad_norm or 0.0)
    losses = {key: held_out(model, batches, count) for key, batches in (("loss", ground.val), ("test", ground.test))}
    cpu = round((time.process_time() - begun) / count, 1)
    lines = []
    for (name, rates), group in zip(wanted.items(), groups, strict=True):
        for rate in rates:
            found = {key: each[len(lines)] for key, each in losses.items()}
            about = {"task": task, "method": name, "budget": rank, "rate": rate, "seed": seed}
            lines.append({**about, **found, **group.sizes(targets), "cpu": cpu, "beside": count})
    return lines


def repeated(batch: Batch, count: int) -> Batch:
    """The batch once for every run, one run after the other."""
    inputs = {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in batch.inputs.items()}
    return replace(
        batch,
        inputs=inputs,
        labels=batch.labels.repeat(count, 1),
        rows=batch.rows * count,
        tokens=batch.tokens * count,
        supervised=batch.supervised * count,
        places=None,
        confidence=(),
        columns=(),
        widths=(),
    )


def held_out(model: nn.Module, batches: Any, count: int) -> list[float]:
    """Mean loss per target of every run; infinite where it diverged."""
    sums_N, targets = torch.zeros(count, dtype=torch.float64), 0
    for index in range(batches.steps_per_epoch):
        for batch in batches.step(0, index):
            found = row_sums(model, [repeated(batch, count)])
            sums_N += torch.from_numpy(found.loss_R).view(count, -1).sum(1)
            targets += batch.supervised
    return [round(loss, 5) if math.isfinite(loss) else math.inf for loss in (sums_N / targets).tolist()]


def first_gradients(model: nn.Module, targets: Mapping[str, nn.Module], batches: Any) -> dict[str, Tensor]:
    """The mean gradient of every target's weight over the first batches of the run, [O, I] by name."""
    model.requires_grad_(False)
    for module in targets.values():
        module.weight.requires_grad_(True)
    for batch in first(batches):
        (summed_loss(model, batch) / batch.supervised / GRADIENT_BATCHES).backward()
    found = {name: module.weight.grad for name, module in targets.items()}
    for module in targets.values():
        module.weight.grad = None
        module.weight.requires_grad_(False)
    return found


def first(batches: Any) -> Iterable[Batch]:
    for index in range(GRADIENT_BATCHES):
        yield from batches.step(0, index)
