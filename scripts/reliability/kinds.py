"""The kinds of trials, by name."""

from __future__ import annotations

from . import checkpoints, inputs, kills
from .trial import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (inputs.RECIPES, inputs.ROWS, inputs.ADAPTERS, checkpoints.KIND, kills.KIND)
}
