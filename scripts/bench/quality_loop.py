"""The loop around a model of stock PEFT, and what is measured of any model: shared by quality.py and real.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dynlora_cli.data.batches import Batches
from dynlora_cli.errors import MeasureError
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.tasks.loss import summed_loss


@dataclass(frozen=True)
class Course:
    """How a model of PEFT's is trained: AdamW over so many steps, at `rate` times the share of each step (from 1)."""

    steps: int
    rate: float
    share: Callable[[int], float]
    weight_decay: float = 0.0
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


def train_peft(
    model: Any,
    batches: Batches,
    course: Course,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    penalty: Callable[[], torch.Tensor] | None = None,
    stepped: Callable[[int], None] = lambda _: None,
) -> None:
    """The loop around stock PEFT: dynlora's own without rank control.

    Args:
        autocast: makes the context of the forward pass.
        penalty: what is added to the loss.
        stepped: hears of each step (from 0) before its gradient goes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=course.rate, weight_decay=course.weight_decay, betas=course.betas)
    model.train()
    for done in range(course.steps):
        micro_batches = batches.step(*divmod(done, batches.steps_per_epoch))
        supervised = sum(batch.supervised for batch in micro_batches)
        for batch in micro_batches:
            with autocast():
                loss = summed_loss(model, batch) / supervised
            if penalty:
                loss = loss + penalty() / len(micro_batches)
            if not math.isfinite(loss.item()):
                raise MeasureError(f"the loss of step {done + 1} is {loss.item()}", "lower the rate")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, course.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = course.rate * course.share(done + 1)
        optimizer.step()
        stepped(done)
        optimizer.zero_grad()


def measure(
    model: Any,
    batches: Batches,
    key: str,
    *,
    classify: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """The loss over rows, nats per target, with its standard error over rows; under the name `key`."""
    rows = (b for index in range(batches.steps_per_epoch) for b in batches.step(0, index))
    found = row_sums(model, rows, autocast=autocast)
    residual_R = found.loss_R - found.loss * found.targets_R
    error = math.sqrt(float((residual_R**2).sum())) / found.targets
    result: dict[str, Any] = {key: round(found.loss, 5), f"{key}_error": round(error, 5)}
    return result | ({f"{key}_accuracy": found.accuracy} if classify else {})
