"""A whole recipe: its sections, which have been found to go together."""

from __future__ import annotations

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from dynlora_cli.config.conflicts import conflicts
from dynlora_cli.config.sections import Settings


class Recipe(Settings):
    """All settings of a run."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> Recipe:
        found = list(conflicts(self))
        if found:
            text = "; ".join(f"{conflict.key}: {conflict.text}" for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self
