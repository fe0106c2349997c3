"""Keep the largest components.

What it does
    Scores a component by the Frobenius norm of its share of the update, s·‖b_i‖·‖a_i‖, per number it holds. The
    components are turned into the SVD basis first, so within one layer this keeps the best approximation of the update.

When to use it
    Where gradients are few or noisy, and as the plain alternative to `fisher`.

Reference
    LoRA-Squeeze (arXiv 2602.10993) and PARA (arXiv 2604.27796) cut by singular value after training.
"""

from __future__ import annotations

from torch import Tensor

from dynlora_cli.components import Pool


class Policy:
    """Scores by size; keeps no state."""

    needs_gradients = False

    def __init__(self, seed: int) -> None: ...

    def observe(self, gate_gradient_K: Tensor) -> None: ...

    def scores(self, pool: Pool) -> Tensor:
        return pool.magnitudes_K() / pool.costs_K()

    def select(self, keep_K: Tensor) -> None: ...

    def restart(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
