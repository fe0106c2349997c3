"""Old components whose directions stay and whose magnitudes train (`adapter.old: magnitudes`), beside new ones.

    W' = W + s · (Σ_old m_i b_i a_iᵀ + Σ_new b_i a_iᵀ)          m = 1 at the start

So a new update may use what an earlier one has found, louder, softer or turned round, and cannot change what it is. At
the end m_i goes into b_i, and the adapter is a plain LoRA again, in whose files every old a_i is what it was, bit for
bit, and every b_i a multiple of what it was.

This is SD-LoRA (Wu et al., ICLR 2025) for single components. There each earlier task has one magnitude in a layer, and
its direction AB is divided by its norm; the newest task has a magnitude as well. Here each component has its own, and
counts from the size that it has, so that the run begins with the function of the old adapter; a new component's size is
that of its b. Old components are pruned like new ones, under one budget.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.gated import GatedLinear


class MagnitudeLinear(GatedLinear):
    """A frozen linear layer plus s·B diag(m) A, where of an old component m alone trains, and of a new one all but m.

    The last column of a_CI is m.
    """

    turns = True  # the new components alone, whose m is 1

    def start(self, a_CI: Tensor, b_OC: Tensor, generator: torch.Generator) -> None:
        super().start(a_CI[:, :-1], b_OC, generator)
        a_CI[:, -1] = 1

    def mark_held(self, a_CI: Tensor, b_OC: Tensor) -> None:
        super().mark_held(a_CI[:, :-1], b_OC)
        a_CI[self.old :, -1] = True
