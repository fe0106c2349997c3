"""The kinds of trials, by name."""

from __future__ import annotations

from . import checkpoints, clock, disk, inputs, kills, ranks, writers
from .trial import Kind

_ALL = (
    inputs.RECIPES, inputs.ROWS, inputs.ADAPTERS, checkpoints.KIND, kills.KIND, disk.KIND, writers.KIND, clock.KIND,
    ranks.KIND,
)  # fmt: skip
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
