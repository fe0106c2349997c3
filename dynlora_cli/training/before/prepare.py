"""What a task makes with the model before the first step, such as the pictures of a prior."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.errors import Interrupted
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.tasks.task import Beginning
from dynlora_cli.text import duration

if TYPE_CHECKING:
    from dynlora_cli.training.run import Run

EVERY = 15.0  # seconds between two words on how far it is


def prepare(run: Run) -> None:
    """Have the task make it with the model as its base alone is; most need nothing.

    Raises:
        Interrupted: Ctrl-C; there is nothing to save yet.
        DynloraError: what the task raises.
    """
    given = Beginning(
        model=run.model,
        tokenizer=run.base.tokenizer,
        examples=run.batches.examples,
        folder=Path(run.recipe.output_dir),
        seed=run.recipe.seed,
        rows=run.recipe.train.micro_batch_size,
        part=(run.accelerator.process_index, run.accelerator.num_processes),
        goes_on=run.progress.step > 0,
    )
    began = told = time.monotonic()
    ended = False
    with run.random, interruptible() as interrupted, run.trained.switched_off():
        for what, done, of in run.task.prepare(given):
            (votes,) = run.total(interrupted())
            if votes:
                text = f"interrupted before the first step, {what}: {done:,} of {of:,}; no step of the run was done"
                raise Interrupted(text, "start again with --overwrite")
            now = time.monotonic()
            if done == of and not ended:
                ended = True
                run.note(f"{what}: {of:,}, in {duration(now - began)}")
            elif 0 < done < of and now - told > EVERY:
                told = now
                run.note(f"{what}: {done:,} of {of:,}, about {duration((now - began) / done * (of - done))} left")
