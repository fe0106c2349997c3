"""Keep the components whose removal would raise the held-out loss, to first order.

What it does
    Averages each gate's gradient, dL/dg_i = <a_i, dL/da_i>, with its sign. Removing component i changes the loss by
    -dL/dg_i to first order, so that is its worth, per number it holds; a component that does harm has a negative one.

When to use it
    In `dynlora prune`, on rows that were held out: the adapter has not made its peace with them, so the sign still
    says something. In training, where the mean gradient goes to zero, `fisher` is the better one.

Reference
    Held-out first-order saliency of LoRA components; the identity is that of Molchanov et al. 2017
    (arXiv 1611.06440), Taylor pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.gradients import GateGradients

needs = "gradients"


def scores(pool: Pool, gradients: GateGradients, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The rise of the loss that removal would cause, per number. [K]"""
    return -gradients.mean(pool) / pool.costs_K()
