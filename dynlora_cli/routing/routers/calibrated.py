"""The update that a calibrated library is sure enough of; else the base.

What it does
    Activates an update where the evidence for it is above the calibrated threshold, so that unrelated requests are
    rarely answered by an update (library/activation.py).

When to use it
    Whenever the library is calibrated. It is the one router that promises how rarely it is wrong.

Reference
    docs/howto/library.md; the threshold is a quantile as in split conformal prediction, Vovk et al. 2005.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynlora_cli.library.activation import Activator, Decision
from dynlora_cli.routing.router import Asked, Context

UNIT = "request"
NEEDS = ("keys",)
FINAL = True


class Calibrated:
    """The library's Activator as a router."""

    def __init__(self, activator: Activator) -> None:
        self.activator, self.notes = activator, list(activator.notes)

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """A decision for each."""
        return self.activator.decide([request.text for request in requests])


def make(context: Context) -> Calibrated:
    """Of the library and its encoder."""
    assert context.library is not None
    assert context.encoder is not None
    return Calibrated(Activator(context.library, context.encoder))
