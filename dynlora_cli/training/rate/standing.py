"""Where a run stands, kept in memory to be put back: what trains, its moments, random numbers, the scale of fp16.

Only for the first steps of a run, in which no component goes and no gradient is scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.moments import forget_steps
from dynlora_cli.runs.events import Event
from dynlora_cli.training.run import Run


@dataclass
class Standing:
    """A copy of all that an optimizer step changes.

    Attributes:
        values: of the parameters.
        moments: the optimizer's state of each; None: as before its first step.
        random: states of torch's generators, on the CPU and where the run computes.
        scaler: of fp16; empty where there is none.
        tally: what the objective has counted since it was asked last.
    """

    values: list[Tensor]
    moments: list[dict[str, Any]] | None
    random: list[Tensor]
    scaler: dict[str, Any]
    tally: Any

    @classmethod
    def beginning(cls, run: Run) -> Standing:
        """Before the first step."""
        return cls(_values(run), None, _random(run), _scaler(run), None)

    @classmethod
    def now(cls, run: Run) -> Standing:
        """After some steps."""
        moments = [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
            for state in (run.optimizer.state[parameter] for parameter in run.parameters)
        ]
        return cls(_values(run), moments, _random(run), _scaler(run), copy.deepcopy(run.objective.tally))

    @torch.no_grad()
    def put_back(self, run: Run) -> None:
        """Let the run stand here, in the memory that it has already."""
        for parameter, value in zip(run.parameters, self.values, strict=True):
            parameter.copy_(value)
        if self.moments is None:
            forget_steps(run.optimizer)
        else:
            for parameter, kept in zip(run.parameters, self.moments, strict=True):
                state = run.optimizer.state[parameter]
                for key, value in kept.items():
                    if isinstance(value, Tensor):
                        state[key].copy_(value)
                    else:
                        state[key] = value  # bitsandbytes counts its steps in a plain number
        run.trained.zero_grad(run.optimizer)
        torch.set_rng_state(self.random[0])
        if len(self.random) > 1:
            torch.cuda.set_rng_state(self.random[1], run.accelerator.device)
        if run.accelerator.scaler is not None:  # a trial that overflowed has lowered it
            run.accelerator.scaler.load_state_dict(self.scaler)
        run.objective.tally = copy.deepcopy(self.tally)


def _values(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


def _random(run: Run) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(run.accelerator.device)] if run.accelerator.device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _scaler(run: Run) -> dict[str, Any]:
    return {} if run.accelerator.scaler is None else run.accelerator.scaler.state_dict()


def _later(event: Event, seconds: float) -> Event:
    return {**event, "seconds": event["seconds"] + seconds} if "seconds" in event else event


@contextmanager
def told_later(run: Run) -> Iterator[list[Callable[[float], None]]]:
    """Keep what the run tells files, listener and trackers inside the block, notes apart.

    Yields:
        Functions that tell it after all, in order; each takes seconds that were spent before.
    """
    emit, track, kept = run.emit, run.track, list[Callable[[float], None]]()

    def keep_event(event: Event) -> None:
        if event["event"] == "note":
            emit(event)
            return
        kept.append(lambda before: emit(_later(event, before)))

    def keep_numbers(numbers: Mapping[str, float], step: int) -> None:
        kept.append(lambda _: track(numbers, step))

    run.emit, run.track = keep_event, keep_numbers
    try:
        yield kept
    finally:
        run.emit, run.track = emit, track
