"""For each token in each layer one adapter: Arrow finds a few, SpectR takes the best of them.

What it does
    The `top_k` adapters by |v₁ · x| are looked at again by ‖S Vᵀ x‖, and the best is applied as it was trained. No
    softmax, so the size of an update stays what it is.

When to use it
    Large libraries without keys, of which a token should use one adapter. It needs no data and no training.

Reference
    Fleshman and Van Durme, LoRA-augmented generation (LAG), 2507.05346.
"""

from __future__ import annotations

from torch import Tensor

from dynlora_cli.routing.router import Context
from dynlora_cli.routing.spectral import SpectralGates, Spectrum, only_top_k

UNIT = "token"
NEEDS = ("factors",)
OPTIONS = {"top_k": {"type": "int", "default": 3, "at_least": 1, "help": "Adapters that Arrow leaves to SpectR."}}


def make(context: Context) -> SpectralGates:
    """Of the adapters in a bank."""
    top_k = context.options.top_k

    def weigh(spectrum: Spectrum, h_NR: Tensor) -> Tensor:
        left_NK = only_top_k(spectrum.arrow(h_NR), top_k).isfinite()
        score_NK = spectrum.spectr(h_NR).masked_fill(~left_NK, -1.0)
        best_N1 = score_NK.argmax(1, keepdim=True)
        return score_NK.new_zeros(score_NK.shape).scatter(1, best_N1, 1.0)

    return SpectralGates(context, weigh)
