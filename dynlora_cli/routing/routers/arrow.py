"""For each token in each layer the adapters whose strongest direction it lies along, weighed by a softmax.

What it does
    Scores an adapter by |v₁ · x|: x is the layer's input, and v₁ the input direction that the adapter's update
    amplifies most. The best `top_k` get softmax weights. It is PEFT's Arrow, from the same numbers, and takes what PEFT
    refuses: adapters of different ranks, and of different layers.

    The score grows with the length of x. Where that is large, the softmax is close to one adapter; with `norm` unit,
    scores lie between 0 and 1, and want a `router_temperature` far below 1.

    With `general` (GenKnowSub), the mean update of some adapters of general text is taken from every other one,
    exactly. PEFT takes the mean of A and that of B apart, which are not the factors of the mean.

When to use it
    Adapters without keys, on requests that mix their topics. It needs no data and no training.

Reference
    Ostapenko et al., Towards modular LLMs by building and reusing a library of LoRAs, 2405.11157; GenKnowSub, ACL 2025
    (2025.acl-short.54); PEFT tuners/lora/arrow.py.
"""

from __future__ import annotations

from dynlora_cli.config.mix import parse_mix
from dynlora_cli.errors import UsageError
from dynlora_cli.routing.router import Context
from dynlora_cli.routing.spectral import SpectralGates, top_k_softmax

UNIT = "token"
NEEDS = ("factors",)
OPTIONS = {
    "top_k": {"type": "int", "default": 3, "at_least": 1, "help": "Adapters of a token at most."},
    "router_temperature": {"type": "float", "default": 1.0, "above": 0, "help": "The scores are divided by it."},
    "norm": {"type": "choice", "choices": ["raw", "unit"], "default": "raw", "help": "Length of x: as it is, or 1."},
    "general": {"type": "str", "default": None, "help": "Adapters to take the mean of from the others, such as a+b."},
}


def make(context: Context) -> SpectralGates:
    """Of the adapters in a bank."""
    options = context.options
    return SpectralGates(
        context,
        lambda spectrum, h_NR: top_k_softmax(spectrum.arrow(h_NR), options.top_k, options.router_temperature),
        unit=options.norm == "unit",
        general=_general(options.general, context.names),
    )


def _general(text: str | None, names: tuple[str, ...]) -> list[str]:
    """The adapters of `general`.

    Raises:
        UsageError: one is not there, or none is left to choose among.
    """
    mix = parse_mix(text, names) if text else {}
    if any(weight != 1 for weight in mix.values()):
        raise UsageError(f"--set general={text}: their mean is taken, so they have no weights", "write general=a+b")
    if mix and not set(names) - set(mix):
        raise UsageError(f"--set general={text} leaves no adapter to choose", "name fewer of them")
    return list(mix)
