"""The state of a run: the parts the loop works with, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynlora_cli.data.streaming.batches import StreamBatches
from dynlora_cli.runs import events
from dynlora_cli.tasks import task as tasks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.batches import Batch, Batches
    from dynlora_cli.data.examples import Example
    from dynlora_cli.data.load import Data
    from dynlora_cli.evaluation.also import Measured, RowSet
    from dynlora_cli.evaluation.generation import Prompt
    from dynlora_cli.execution.mode import Modes
    from dynlora_cli.lora.start import Start
    from dynlora_cli.lora.whole import Trained
    from dynlora_cli.models.load import Base
    from dynlora_cli.models.randomness import Randomness
    from dynlora_cli.pruning.control import Control
    from dynlora_cli.tasks.objective import Objective
    from dynlora_cli.tasks.task import Task


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        learning_rate: the highest of the run, before the coupling; None until it is settled.
        rate_from: where it is from: "recipe", "prior" (a guess before training), "race of 3" (short trials).
        rates_tried: where it was searched for: rates with the loss of their trials, None where one diverged.
        rate_seconds: spent on that, beside the trial that became the run; a part of `seconds`.
        tokens: tokens seen, padding not counted.
        seconds: spent in steps and on finding the learning rate, over all sessions of the run.
        tokens_per_second_start, tokens_per_second_end: median over the first and the newest line of metrics.
        held_start, held_end: bytes of base, of what trains and of the optimizer, likewise.
        first: held-out result before training.
        last: newest held-out result.
        best: step and loss of the best evaluation after the budget was met.
        evaluations_since_best: for early stopping.
        also: what was found on the rows of other kinds before training, by name of the set.
    """

    step: int = 0
    learning_rate: float | None = None
    rate_from: str = "recipe"
    rates_tried: list[tuple[float, float | None]] = field(default_factory=list)
    rate_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second_start: float | None = None
    tokens_per_second_end: float | None = None
    held_start: dict[str, int] | None = None
    held_end: dict[str, int] | None = None
    first: dict[str, float] | None = None
    last: dict[str, float] | None = None
    best: dict[str, float] | None = None
    evaluations_since_best: int = 0
    also: dict[str, Measured] | None = None


@dataclass
class Run:
    """Everything the loop works with.

    Attributes:
        base, data: the frozen model and its tokenizer; the rows.
        trained: components in a `Pool`, or the whole model.
        start: how many components there were at first, and the budget; None for a whole model.
        control: prunes; without components, `NoControl`.
        parameters: everything that trains; with components, the pool's flat tensor comes first.
        emit: takes every event, see runs/events.py.
        save: writes a checkpoint of the present state.
        modes: how the steps are run: fused, compiled and so on.
        random: the random numbers of this process's part in the run.
        also: rows of other kinds, measured before and after.
        samples: prompts that are answered now and then; rows of a model that draws.
        objective: what training lowers.
        pass_back: adds the gradient of a micro-batch where that is not done here alone, as `step.backward` does it.
        told_of_rounding: a note says already that processors of two kinds train.
        track: sends numbers of a step to the trackers.
    """

    recipe: Recipe
    accelerator: Accelerator
    base: Base
    data: Data
    trained: Trained
    start: Start | None
    optimizer: torch.optim.Optimizer
    control: Control
    batches: Batches | StreamBatches
    val_batches: Batches | None
    total_steps: int
    save: Callable[[Run], None]
    modes: Modes
    random: Randomness
    objective: Objective
    emit: events.Emit = lambda event: None  # noqa: ARG005
    progress: Progress = field(default_factory=Progress)
    also: Sequence[RowSet] = ()
    samples: Sequence[Prompt | Example] = ()
    pass_back: Callable[[Run, Batch, float], Tensor] | None = None
    told_of_rounding: bool = False
    track: Callable[[Mapping[str, float], int], None] = field(init=False)

    def __post_init__(self) -> None:
        self.track = lambda numbers, step: self.accelerator.log(dict(numbers), step=step)

    @property
    def model(self) -> PreTrainedModel:
        return self.base.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def stream(self) -> StreamBatches | None:
        """Its batches, where rows are read while it trains."""
        return self.batches if isinstance(self.batches, StreamBatches) else None

    @cached_property
    def task(self) -> Task:
        """What the model is trained to do."""
        return tasks.of(self.recipe.model, self.recipe.train)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside the block rows may be read ahead."""
        try:
            yield
        finally:
            if self.stream:
                self.stream.close()

    def note(self, text: str) -> None:
        """Leave a note in the run's log."""
        self.emit(events.note(text))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place where there are several."""
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def total(self, *numbers: float | Tensor) -> list[float]:
        """Each number summed over processes."""
        if self.accelerator.num_processes == 1:
            return [float(number) for number in numbers]
        values = [torch.as_tensor(x, dtype=torch.float64, device=self.accelerator.device) for x in numbers]
        return self.reduce(torch.stack(values)).tolist()
