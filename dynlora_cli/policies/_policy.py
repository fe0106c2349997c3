"""What a pruning policy is: a file in this folder with a class `Policy` of this shape.

Dimensions: K components of the pool.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dynlora_cli.components import Pool


class Policy(Protocol):
    """Scores the components of a pool. It never decides: `rank.RankControl` does, for all policies alike."""

    # True: `observe` is called after every backward of the pruning phase, and scores are of the time before an event.
    # False: scores are taken from the values as they stand, after they were turned into the SVD basis.
    needs_gradients: bool

    def __init__(self, seed: int) -> None: ...

    def observe(self, gate_gradient_K: Tensor) -> None:
        """Take dL/dg of every component, once per optimizer step, before clipping."""

    def scores(self, pool: Pool) -> Tensor:
        """What a component is worth per number it holds; higher is better. [K], finite."""

    def select(self, keep_K: Tensor) -> None:
        """Forget the components that were removed; `keep_K` is boolean over those that were there."""

    def restart(self) -> None:
        """Forget all averages: the components now mean something else (a change of gauge)."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in another process."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
