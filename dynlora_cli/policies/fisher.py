"""Keep the components that the loss is most sensitive to.

What it does
    Averages the square of each gate's gradient, dL/dg_i = <a_i, dL/da_i>, over the optimizer steps since the last
    event: F_i. Its root, per number the component holds, is the score. The square, not the sign: near a minimum the
    signed mean is noise. It costs nothing beyond the gradients that exist, and has no bias for large layers, since it
    is in units of the loss.

When to use it
    The default. It needs training steps between events; where there are only a few, `magnitude` is nearly as good.

Reference
    The diagonal of the empirical Fisher information, as in optimal brain surgery; AdaLoRA (arXiv 2303.10512) smooths
    |w · dL/dw| instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.components import Pool

DECAY = 0.95


class Policy:
    """Scores by the root of the averaged squared gate gradient."""

    needs_gradients = True

    def __init__(self, seed: int) -> None:  # noqa: ARG002 - the same arguments for every policy
        self.average_K: Tensor | None = None
        self.steps = 0

    def restart(self) -> None:
        self.average_K = None
        self.steps = 0

    def observe(self, gate_gradient_K: Tensor) -> None:
        square = gate_gradient_K.square()
        self.steps += 1
        self.average_K = (1 - DECAY) * square if self.average_K is None else self.average_K.lerp(square, 1 - DECAY)

    def scores(self, pool: Pool) -> Tensor:
        if self.average_K is None:  # nothing observed yet: no component is known to be better than another
            return torch.zeros(pool.components, device=pool.values.device)
        unbiased = self.average_K / (1 - DECAY**self.steps)
        return unbiased.sqrt() / pool.costs_K()

    def select(self, keep_K: Tensor) -> None:
        if self.average_K is not None:
            self.average_K = self.average_K[keep_K]

    def state_dict(self) -> dict[str, Tensor]:
        if self.average_K is None:
            return {}
        return {"average": self.average_K, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average_K = state.get("average")
        self.steps = int(state["steps"]) if state else 0
