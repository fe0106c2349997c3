"""Keep the components that change the layers' outputs most, on real inputs.

What it does
    Weighs the error of a removal by the covariance of the layer's inputs, C = E[x xᵀ]: the components are turned into
    the left singular vectors of ΔW·C^½, u_i u_iᵀ ΔW, of which dropping the last k is the best approximation of
    E‖ΔW x‖². A component's worth is its share of that, E(u_iᵀ ΔW x)², per number it holds.

When to use it
    In `dynlora prune`, wherever there are rows to look at; the best of the policies there. It needs only the k x k
    covariance of A x, never one of the layer's size.

Reference
    SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821) weigh the decomposition of whole weights in this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.components import Pool
from dynlora_cli.inputs import InputEnergies

needs = "inputs"


def scores(pool: Pool, inputs: InputEnergies, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The component's share of the update's output, squared, per number. [K]"""
    return inputs.energies_K / pool.costs_K()
