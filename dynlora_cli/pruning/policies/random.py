"""Keep components by lot.

What it does
    Draws the scores anew at each event.

When to use it
    As the control that every other policy has to beat.

Reference
    None needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool


def scores(pool: Pool, observed: None, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Uniform numbers from the run's own generator. [K]"""
    return torch.rand(pool.components, generator=generator).to(pool.values.device)
