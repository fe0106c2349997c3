"""Reconstruction: a hypernetwork learns to write adapters that exist.

What it does
    The rows of the n-th source stand for the n-th adapter of `adapter.library`. What the network writes of their
    descriptions is compared with that adapter's factors, all in one SVD basis: the mean absolute difference of
    z-scores. The base model is not asked while it trains; what is held out is measured with it, as ever.

When to use it
    To put many adapters into one file. It is cheap, as no text is read; but the network learns what adapters look like
    and not what they are good for, so end to end (`sft`) is better for tasks that it has not seen.

Reference
    Charakorn et al. 2025, Text-to-LoRA (arXiv 2506.06105), the reconstruction loss with z-scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynlora_cli.tasks import objective

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynlora_cli.data.batches import Batch

LIBRARY = True
RATE = 10.0  # 1e-3 to 1e-2 on small networks, where sft wants 1e-4 to 3e-4; the paper has 1e-3 and 2.5e-5
UNIT = "z-scores"
CONFLICTS = [
    {"with": "adapter.library", "is": None, "why": "it learns from adapters", "hint": "name their folders"},
    {
        "with": "adapter.variant",
        "is_not": "text-to-lora",
        "why": "adapters are written number by number by text-to-lora alone",
        "hint": "write `variant: text-to-lora`",
    },
    {"with": "dataset.replay", "why": "rows of earlier runs belong to no adapter", "hint": "leave it out"},
]


class Objective(objective.Objective):
    """The distance to adapters; see the head of this file."""

    distance: Callable[[Batch], Tensor]

    def begin(self, trained: Any) -> None:
        self.distance = trained.distance

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # noqa: ARG002
        """The mean over a batch's rows, as a sum over its targets: training divides by those of the step."""
        return self.distance(batch) * batch.supervised
