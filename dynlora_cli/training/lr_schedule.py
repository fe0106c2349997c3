"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Train


def warmup_steps(total_steps: int, options: Train) -> int:
    """Optimizer steps over which the rate rises."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return max(1, round(options.warmup_ratio * total_steps)) if options.warmup_ratio else 0


def rate_share(step: int, total_steps: int, options: Train) -> float:
    """The scheduled rate of optimizer step `step` (from 1), as a share of the highest one."""
    warmup = warmup_steps(total_steps, options)
    if step <= warmup:
        return step / warmup
    left = 1 - (step - warmup - 1) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}
    return shape[options.lr_scheduler]
