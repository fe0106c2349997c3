"""The same adapters for every request, as the person says.

What it does
    Gives every request one mix: `a`, `a+b` (both as they were trained, added), `0.7*a+0.3*b`, or `base`.

When to use it
    To blend adapters by hand, and as the mark that other routers have to pass.

Reference
    Ilharco et al., Editing models with task arithmetic, 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynlora_cli.config.mix import mix_text, parse_mix
from dynlora_cli.errors import UsageError
from dynlora_cli.library.activation import Decision
from dynlora_cli.routing.router import Asked, Context

UNIT = "request"
NEEDS = ()
FINAL = True
OPTIONS = {"mix": {"type": "str", "default": None, "help": "Such as a+b or 0.7*a+0.3*b."}}


class Fixed:
    """One decision for all."""

    def __init__(self, mix: dict[str, float]) -> None:
        self.notes: list[str] = []
        self.decision = Decision(tuple(mix), {}, f"fixed: {mix_text(mix)}", weights=mix)

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """The same each time."""
        return [self.decision for _ in requests]


def make(context: Context) -> Fixed:
    """Of the option `mix`."""
    if context.options.mix is None:
        raise UsageError("the router fixed must be told which adapters", "for example --set mix=0.7*ONE+0.3*OTHER")
    return Fixed(parse_mix(context.options.mix, context.names))
