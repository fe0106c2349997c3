"""What a variant is: a file in this folder with a function `attach` of this shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

from dynlora_cli.components import Pool
from dynlora_cli.rank import Start

if TYPE_CHECKING:
    from dynlora_cli.recipe import Recipe


class Variant(Protocol):
    """How a layer uses its components."""

    # False: the variant has no components; everything of the base model trains, and rank and pruning do not apply.
    has_components: bool

    def attach(self, model: nn.Module, targets: Mapping[str, nn.Module], start: Start, recipe: Recipe) -> Pool:
        """Put components on the target layers of a frozen model, in place; the model's output stays the same."""
