"""For each token in each layer the adapters that would change most, weighed by a softmax.

What it does
    Scores an adapter by ‖S Vᵀ x‖ over all directions of its update U S Vᵀ, where Arrow looks at one. U does not change
    a length, so this is the length of what the adapter would add to the layer's output. The best `top_k` get softmax
    weights.

When to use it
    As Arrow, for adapters whose updates have several directions of like size. An adapter with a large update wins
    more often than one with a small update, whatever the token.

Reference
    Fleshman and Van Durme, SpectR: dynamically composing LM experts with spectral routing, 2504.03454; weights as in
    Arrow.
"""

from __future__ import annotations

from dynlora_cli.routing.router import Context
from dynlora_cli.routing.spectral import SpectralGates, top_k_softmax

UNIT = "token"
NEEDS = ("factors",)
OPTIONS = {
    "top_k": {"type": "int", "default": 3, "at_least": 1, "help": "Adapters of a token at most."},
    "router_temperature": {"type": "float", "default": 1.0, "above": 0, "help": "The scores are divided by it."},
    "norm": {"type": "choice", "choices": ["raw", "unit"], "default": "raw", "help": "Length of x: as it is, or 1."},
}


def make(context: Context) -> SpectralGates:
    """Of the adapters in a bank."""
    options = context.options
    return SpectralGates(
        context,
        lambda spectrum, h_NR: top_k_softmax(spectrum.spectr(h_NR), options.top_k, options.router_temperature),
        unit=options.norm == "unit",
    )
