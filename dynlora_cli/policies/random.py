"""Keep components by lot.

What it does
    Scores are drawn anew at each event from a generator of its own.

When to use it
    As the control that every other policy has to beat.

Reference
    None needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.components import Pool


class Policy:
    """Scores by chance; the state is that of the generator."""

    needs_gradients = False

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, gate_gradient_K: Tensor) -> None: ...

    def scores(self, pool: Pool) -> Tensor:
        return torch.rand(pool.components, generator=self.generator).to(pool.values.device)

    def select(self, keep_K: Tensor) -> None: ...

    def restart(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
