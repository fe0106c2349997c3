"""The batches of a run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.examples import Example
from dynlora_cli.data.packing_check import packed_mask_dtype
from dynlora_cli.data.rows.sequences import joined, lengths_of
from dynlora_cli.data.streaming.batches import StreamBatches
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.load import Base
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.load import Data
    from dynlora_cli.data.mix import Span

# Of a run that chooses its length: two passes, one where that makes so many steps; more, where two make very few.
ENOUGH_STEPS, FEWEST_STEPS, MOST_PASSES = 1000, 75, 4


def training_batches(recipe: Recipe, data: Data, base: Base, accelerator: Accelerator | None = None) -> Batches:
    """The batches that a run trains on: its rows by their weights, those of earlier runs; of a stream the first."""
    examples = joined(data.train, data.replayed)
    return make_batches(recipe, examples, base, shuffle=True, accelerator=accelerator, spans=data.spans)


def run_batches(recipe: Recipe, data: Data, base: Base, accelerator: Accelerator) -> Batches | StreamBatches:
    """The batches of a whole run, those of rows that are read while it trains as well."""
    if data.stream is None:
        return training_batches(recipe, data, base, accelerator)
    make = partial(make_batches, recipe, base=base, shuffle=True, accelerator=accelerator)
    assert recipe.train.max_steps is not None
    return StreamBatches(data, data.stream, make, recipe.train.max_steps)


def make_batches(
    recipe: Recipe,
    examples: Sequence[Example],
    base: Base,
    *,
    shuffle: bool,
    accelerator: Accelerator | None = None,
    spans: Sequence[Span] = (),
) -> Batches:
    """Batches of the recipe's size, of this process's share where there is an accelerator.

    Args:
        recipe: says the size, and whether training keeps the order of the rows.
        examples: all of one task.
        base: pads, and says how packed rows are masked.
        shuffle: they are trained on, not measured.
        accelerator: of the run.
        spans: how many of them an epoch takes, source by source; none: all of them once.
    """
    longest = int(lengths_of(examples).max())
    packing = recipe.dataset.packing
    capacity = max(longest, min(recipe.dataset.max_length, base.files.context_length or recipe.dataset.max_length))
    kind = base.model.device.type
    return Batches(
        examples,
        micro_batch_size=recipe.train.micro_batch_size,
        accumulation=recipe.train.gradient_accumulation_steps,
        seed=recipe.seed,
        max_length=capacity,
        pad_id=base.tokenizer.pad_token_id,
        packing=packing,
        shuffle=shuffle and recipe.dataset.shuffle,
        spans=spans,
        shards=accelerator.num_processes if accelerator else 1,
        shard=accelerator.process_index if accelerator else 0,
        mask_dtype=packed_mask_dtype(base.model, capacity) if packing and kind != "meta" else torch.bool,
        pin=kind == "cuda",
        even=shuffle and plan(recipe.train).even_batches,
    )


def total_steps(recipe: Recipe, batches: Batches | StreamBatches) -> int:
    """Optimizer steps of the whole run."""
    return recipe.train.max_steps or passes(recipe.train, batches.steps_per_epoch) * batches.steps_per_epoch


def passes(train: Train, steps_per_epoch: int) -> int:
    """Passes over the training rows, where `train.max_steps` does not decide: `train.epochs`.

    Left open, rows come up twice, large data once, and fewer than 300 up to four times. Whether a second pass helps
    depends on the data: some are learned by it, of others it only makes the model sure. So the best of the held-out
    losses on the way is kept (scripts/bench/NOTES.md).
    """
    if train.epochs != "auto":
        return train.epochs
    if steps_per_epoch >= ENOUGH_STEPS:
        return 1
    return min(MOST_PASSES, max(2, -(-FEWEST_STEPS // steps_per_epoch)))


def passes_note(train: Train, batches: Batches | StreamBatches, *, watched: bool) -> list[str]:
    """What to say of a run that chose its length; `watched` where rows are held out."""
    if not chose_passes(train):
        return []
    often, steps = passes(train, batches.steps_per_epoch), batches.steps_per_epoch
    rows = counted(batches.rows_per_epoch, "row")
    kept = "; the adapter is the best of those that are measured on the way"
    if not watched:
        kept = "; no rows are held out to choose the best by, so the adapter is the last"
    length = f"{counted(often, 'pass', 'passes')} over {rows}, {counted(often * steps, 'step')}"
    return [f"train.epochs: auto is {length}{kept if often > 1 else ''}"]


def chose_passes(train: Train) -> bool:
    """Whether how long the run is was left open."""
    return train.epochs == "auto" and train.max_steps is None


def on_device(recipe: Recipe, accelerator: Accelerator, base: Base, examples: Sequence[Example]) -> list[Batch]:
    """Batches of examples that are measured again and again."""
    rows = make_batches(recipe, examples, base, shuffle=False)
    return [batch.to(accelerator.device) for index in range(rows.steps_per_epoch) for batch in rows.step(0, index)]
