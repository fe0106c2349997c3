"""What a pruning policy is: a file in this folder with these two names.

    needs = "values" | "gradients" | "entries" | "covariances"
        values: scores are of the components as they stand, after they were turned into the SVD basis.
        gradients: from gate gradients; in training of the steps since the last event, after it of held-out rows.
        entries: from averages over every single number, likewise.
        covariances: from what flows through the layers, after the components were turned into the basis that fits it;
            only `dynlora prune` collects that.

    scores(pool, observed, generator) -> Tensor
        What each component is worth per number it holds; higher is better. [K], finite. A policy scores and never
        decides: `select.select_K` does, for all policies alike.

Dimensions: K components of the pool.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.covariances import Energies
from dynlora_cli.pruning.signals import EntryAverages, GateGradients


class Policy(Protocol):
    """The shape of a policy's module."""

    needs: Literal["values", "gradients", "entries", "covariances"]

    def scores(
        self, pool: Pool, observed: GateGradients | EntryAverages | Energies, generator: torch.Generator
    ) -> Tensor:
        """Worth of every component per number it holds. [K]

        Args:
            pool: the components.
            observed: `GateGradients`, `EntryAverages` or `Energies`, as the policy needs.
            generator: of the run, for what is random.
        """
