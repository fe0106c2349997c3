"""One optimizer step in its parts: gradients of micro-batches, reduced and clipped, then the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from dynlora_cli.errors import MeasureError
from dynlora_cli.execution.alike import same_numbers
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.metrics import Window, count_step, log_window

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.training.run import Run

LOWER_RATE = "lower train.learning_rate"


def backward(run: Run, batch: Batch, supervised: float) -> Tensor:
    """Add the gradient of one micro-batch, normalised by the targets of the whole step; returns its share of the loss.

    It is a function of its own so that the autograd graph is freed when it returns, before components are removed. The
    loss stays on the device: reading it would make Python wait for the GPU before it can launch the next micro-batch.
    """
    batch = batch.to(run.accelerator.device)
    run.trained.see(batch)
    with run.accelerator.autocast():
        loss = run.objective.loss(run.model, batch) / supervised
    run.accelerator.backward(loss)
    return loss.detach().double()


def _passed_back(run: Run, number: int, micro_batches: list[Batch], supervised: float) -> list[Tensor]:
    """`backward` of each micro-batch of a step; the policy watches, where it wants to."""
    if not run.control.watches(number):
        pass_back = run.pass_back or backward
        return [pass_back(run, batch, supervised) for batch in micro_batches]
    scaler = run.accelerator.scaler
    divisor, losses = supervised / (1.0 if scaler is None else scaler.get_scale()), []
    for batch in micro_batches:
        with run.control.watching(batch, divisor):
            losses.append(backward(run, batch, supervised))
    return losses


def not_finite(run: Run, what: str, batches: list[Batch]) -> MeasureError:
    """The error, alike in all processes, with the rows of each."""
    name = run.stream.name if run.stream else int
    rows = gather_object([name(row) for batch in batches for row in batch.rows])
    return MeasureError(
        f"{what}, on rows {rows} of the training data",
        f"{LOWER_RATE}, or look at those rows; the last checkpoint is untouched",
    )


def finish_gradient(run: Run, number: int, micro_batches: list[Batch]) -> float | None:
    """Add the variant's penalty, sum over processes and undo the scaling of fp16.

    Returns:
        The norm of the gradient; None where fp16 overflowed.
    """
    penalty = run.trained.penalty()
    if penalty is not None:
        run.accelerator.backward(penalty / run.accelerator.num_processes)
    for parameter in run.parameters:
        if parameter.grad is not None:
            run.reduce(parameter.grad)
    scaler = run.accelerator.scaler
    if scaler is not None:
        scaler.unscale_(run.optimizer)
    run.trained.settle_gradient()
    norm = gradient_norm(run)
    if math.isfinite(norm):
        return norm
    if scaler is not None:
        return None
    raise not_finite(run, f"the gradient of step {number} is {norm}", micro_batches)


def gradient_norm(run: Run) -> float:
    """The norm of the gradient of everything that trains."""
    return torch.nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None]).item()


def clip(run: Run, norm: float) -> float:
    """Take what does not train out of the gradient, and clip the rest; returns its norm before that."""
    if run.trained.let_go():
        norm = gradient_norm(run)
    limit = run.recipe.train.max_grad_norm
    if limit and norm > limit:
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / (norm + 1e-6))
    return norm


def set_rate(run: Run, number: int) -> float:
    """Give the optimizer the learning rate of this step; returns that of the components.

    It is the run's rate, times the schedule's share. That of the components also rises as they become fewer; heads and
    other parameters that train beside them go without.
    """
    assert run.progress.learning_rate is not None
    rate = run.progress.learning_rate * rate_share(number, run.total_steps, run.recipe.train)
    factor = run.control.rate_factor
    for group in run.optimizer.param_groups:
        group["lr"] = rate * (factor if group["coupled"] else 1.0)
    return rate * factor


def update(run: Run, *, skipped: bool) -> None:
    """Let the optimizer step, and the layers after it; `skipped` where fp16 overflowed and the scaler will not step."""
    scaler = run.accelerator.scaler
    with run.trained.rates_of_a_and_b(run.recipe.train.lora_plus_ratio or 1.0):
        if scaler is not None:
            scaler.step(run.optimizer)
            scaler.update()
        else:
            run.optimizer.step()
    run.trained.after_update(0.0 if skipped else run.optimizer.param_groups[0]["lr"])
    run.trained.zero_grad(run.optimizer)


def advance(run: Run, window: Window, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """The next step of a run, counted and, where a line of metrics is due, logged; returns what `step` does.

    Args:
        run: the run.
        window: what happened since the last line.
        interrupted: whether Ctrl-C was pressed.
    """
    epoch, index = divmod(run.progress.step, run.batches.steps_per_epoch)
    started = time.perf_counter()
    record = step(run, run.batches.step(epoch, index), interrupted)
    count_step(run, record, time.perf_counter() - started)
    window.add(record)
    if run.progress.step == run.total_steps or run.progress.step % run.recipe.train.log_steps == 0:
        log_window(run, window)
        window.clear()
    return record


def step(run: Run, micro_batches: list[Batch], interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """One optimizer step: gradients of this process's micro-batches, rank control, update.

    Returns:
        loss (mean over the step's targets), grad_norm, learning_rate, tokens, and whether any process wants to stop.
    """
    with run.random:
        if rank := run.accelerator.process_index:
            # The generators in a checkpoint are those of the main process. The others begin anew in each step, so that
            # a run that goes on draws what it would have drawn.
            torch.manual_seed(run.recipe.seed + rank + 1_000_003 * run.progress.step)
        return _step(run, micro_batches, interrupted)


def _step(run: Run, micro_batches: list[Batch], interrupted: Callable[[], bool]) -> dict[str, Any]:
    number = run.progress.step + 1
    supervised, tokens = run.total(sum(b.supervised for b in micro_batches), sum(b.tokens for b in micro_batches))
    run.trained.begin_step(number, run.total_steps)
    last = min(run.total_steps, run.control.next_change(number))
    run.modes.before_step(number, int(last - number + 1) * len(micro_batches))
    losses = _passed_back(run, number, micro_batches, supervised)
    if number < run.total_steps:  # while the GPU still computes the gradient
        run.batches.prepare(*divmod(number, run.batches.steps_per_epoch))
    # Asked late, so that a Ctrl-C during the step still counts for it.
    loss, stop_votes = run.total(sum(losses), interrupted())
    if not math.isfinite(loss):
        batches = zip(micro_batches, losses, strict=True)
        raise not_finite(run, f"the loss of step {number} is {loss}", [b for b, x in batches if not math.isfinite(x)])
    norm = finish_gradient(run, number, micro_batches)
    if norm is not None:  # None: fp16 overflowed and the scaler skips this step
        run.control.observe(number, supervised, run.reduce)
        norm = clip(run, norm)
    else:
        run.control.skip()
    rate = set_rate(run, number)
    update(run, skipped=norm is None)
    if run.control.next_change(number) == number:
        hold_alike(run, f"before the pruning of step {number}")
    event = run.control.apply(number)
    if event:
        hold_alike(run, f"after the pruning of step {number}", before=False)
        run.emit(event)
    return {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": rate,
        "tokens": int(tokens),
        "stop": stop_votes > 0,
    }


def hold_alike(run: Run, when: str, *, before: bool = True) -> None:
    """Compare what all processes hold of the run: what trains, its moments, and what is known of the components.

    Args:
        run: the run.
        when: for the message.
        before: nothing was decided since the last comparison. After a pruning the same components must be left, but
            processors of two kinds may have turned them into other bases: all take one process's.

    Raises:
        DynloraError: a process holds other numbers, so the next all-reduce would add up gradients of other components.
    """
    if run.accelerator.num_processes == 1:
        return
    known = run.control.state_dict()
    held = {f"importance of components ({name})": tensor for name, tensor in known.items()}
    for index, parameter in enumerate(run.parameters):
        held[f"trained numbers ({index})"] = parameter
        for name, moment in run.optimizer.state.get(parameter, {}).items():
            if isinstance(moment, Tensor) and moment.ndim:
                held[f"moments ({index}, {name})"] = moment
    note = same_numbers(held, when, **({} if before else {"tolerance": math.inf}))
    if note:
        run.control.load_state_dict(known)
        if not run.told_of_rounding:
            run.note(note)
            run.told_of_rounding = True
