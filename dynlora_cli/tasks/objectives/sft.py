"""Supervised fine-tuning: the cross-entropy of the targets.

What it does
    Every target, a token or a class, weighs the same.

When to use it
    Where rows hold the right answers.

Reference
    The loss of transformers' models, here computed at the targets alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynlora_cli.tasks import objective
from dynlora_cli.tasks.loss import summed_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynlora_cli.data.batches import Batch


class Objective(objective.Objective):
    """Cross-entropy in nats."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return summed_loss(model, batch)
