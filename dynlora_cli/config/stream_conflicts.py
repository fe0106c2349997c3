"""What does not go with rows that are read while the run trains (`dataset.streaming`)."""

from __future__ import annotations

from collections.abc import Iterator

from dynlora_cli import plugins
from dynlora_cli.config.sections import Dataset, Settings
from dynlora_cli.config.variant_conflicts import Conflict

STREAMING = "dataset.streaming"


def stream_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Settings that need all rows before the first step, and those that only a stream has a use for."""
    data, variant = recipe.dataset, recipe.adapter.variant
    if not data.streaming:
        if data.shuffle_buffer != Dataset.model_fields["shuffle_buffer"].default:
            text = "rows are all in memory, and shuffled whole; write `streaming: true`, or leave it out"
            yield Conflict("dataset.shuffle_buffer", STREAMING, text)
        return
    if recipe.train.max_steps is None:
        text = "nobody knows how many rows a stream has; write how many steps to train, such as `max_steps: 1000`"
        yield Conflict("train.max_steps", STREAMING, text)
    for key, is_given in (("cache", data.cache is True), ("workers", data.workers != "auto")):
        if is_given:
            text = "rows of a stream are not kept on the disk, and one thread reads them; leave it out"
            yield Conflict(f"dataset.{key}", STREAMING, text)
    if data.replay is not None:
        text = "replayed rows are drawn among all rows; leave one of the two out"
        yield Conflict("dataset.replay", STREAMING, text)
    if data.retrieve is not None:
        text = "passages are looked for before the first step; leave one of the two out"
        yield Conflict("dataset.retrieve", STREAMING, text)
    objective = getattr(recipe.train, "objective", plugins.OBJECTIVE)
    if objective != plugins.OBJECTIVE:
        text = f"{objective} looks at all rows before the first step; read them whole, with `streaming: false`"
        yield Conflict(STREAMING, "train.objective", text)
    if plugins.declared("variants", variant, "hypernet") or plugins.declared("variants", variant, "routes"):
        text = f"variant {variant} needs all rows before the first step; read them whole, with `streaming: false`"
        yield Conflict(STREAMING, "adapter.variant", text)
