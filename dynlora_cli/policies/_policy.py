"""What a pruning policy is: a file in this folder with these two names.

    needs = "values" | "gradients" | "inputs"
        values: scores are of the components as they stand, after they were turned into the SVD basis.
        gradients: from gate gradients; in training of the steps since the last event, after it of held-out rows.
        inputs: from what the layers' inputs are, after the components were turned into the basis that fits them; only
            `dynlora prune` collects that.

    scores(pool, observed, generator) -> Tensor
        What each component is worth per number it holds; higher is better. [K], finite. A policy scores and never
        decides: `rank.select_K` does, for all policies alike.

Dimensions: K components of the pool.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.gradients import GateGradients
from dynlora_cli.inputs import InputEnergies


class Policy(Protocol):
    """The shape of a policy's module."""

    needs: Literal["values", "gradients", "inputs"]

    def scores(self, pool: Pool, observed: GateGradients | InputEnergies, generator: torch.Generator) -> Tensor:
        """Worth of every component per number it holds. [K]

        Args:
            pool: the components.
            observed: `GateGradients`, or `InputEnergies` where the policy needs inputs.
            generator: of the run, for what is random.
        """
