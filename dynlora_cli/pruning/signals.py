"""What the ordinary backward pass says about each component, averaged between events.

Dimensions: K components of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool

# Averages forget over about 20 steps.
DECAY = 0.95


class GateGradients:
    """Running averages of dL/dg of every component and of its square, since they last changed their meaning.

    Attributes:
        decay: of the averages, per step; None: all steps count alike.
        steps: optimizer steps observed.
        targets: supervised tokens (or rows) of an optimizer step, averaged.
    """

    def __init__(self, decay: float | None = DECAY) -> None:
        self.decay = decay
        self.restart()

    def restart(self) -> None:
        """Forget everything: after a change of basis the components are others."""
        self.steps = 0
        self.targets = 0.0
        self._mean_K: Tensor | None = None
        self._square_K: Tensor | None = None

    def observe(self, gradient_K: Tensor, targets: float) -> None:
        """Take the gate gradient of one optimizer step: normalised, reduced, not yet clipped.

        A component of an expert that no token of the step was sent to has gradient 0, and that 0 counts. What the score
        stands for is the rise of the mean loss over all tokens when the component goes, and an expert that is needed
        half as often adds half as much to that. Averages over only the steps in which an expert was used would give
        rare experts the rank of common ones.
        """
        if self._mean_K is None or self._square_K is None:
            self._mean_K, self._square_K = torch.zeros_like(gradient_K), torch.zeros_like(gradient_K)
        self.steps += 1
        self.targets += (targets - self.targets) / self.steps
        weight = 1 / self.steps if self.decay is None else 1 - self.decay
        self._mean_K = self._mean_K.lerp(gradient_K, weight)
        self._square_K = self._square_K.lerp(gradient_K.square(), weight)

    def mean(self, pool: Pool) -> Tensor:
        """Average of dL/dg, free of the bias of a short history; zeros before the first step. [K]"""
        return self._unbiased(self._mean_K, pool)

    def square(self, pool: Pool) -> Tensor:
        """Average of (dL/dg)², likewise. [K]"""
        return self._unbiased(self._square_K, pool)

    def removal_K(self, pool: Pool) -> Tensor:
        """Change of the loss when one gate goes from 1 to 0, to second order: -g_i + ½ h_i. [K]

        The curvature h_i is taken from the diagonal of the empirical Fisher information: the variance of the step's
        mean gradient times the number of targets it is the mean of.
        """
        mean = self.mean(pool)
        curvature = self.targets * (self.square(pool) - mean.square()).clamp_min(0) + mean.square()
        return 0.5 * curvature - mean

    def predicted_loss_change(self, removed_K: Tensor, pool: Pool) -> float | None:
        """The sum of `removal_K`; interactions between components are left out. None before the first step."""
        return self.removal_K(pool)[removed_K].sum().item() if self.steps else None

    def _unbiased(self, average_K: Tensor | None, pool: Pool) -> Tensor:
        if average_K is None:
            return torch.zeros(pool.components, device=pool.values.device)
        return average_K if self.decay is None else average_K / (1 - self.decay**self.steps)

    def select(self, keep_K: Tensor) -> None:
        """Forget the components that were removed; `keep_K` is boolean over those that were there."""
        if self._mean_K is not None and self._square_K is not None:
            self._mean_K, self._square_K = self._mean_K[keep_K], self._square_K[keep_K]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in another process."""
        if self._mean_K is None or self._square_K is None:
            return {}
        counters = torch.tensor([self.steps, self.targets], dtype=torch.float64)
        return {"mean": self._mean_K, "square": self._square_K, "counters": counters}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.restart()
        if state:
            self._mean_K, self._square_K = state["mean"], state["square"]
            steps, self.targets = state["counters"].tolist()
            self.steps = int(steps)


class EntryAverages:
    """Running averages for every single number w of the pool: I = |w · dL/dw|, and U = |I - average of I|.

    Source: AdaLoRA (arXiv 2303.10512), equations 8 to 10.
    """

    DECAY = 0.85

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything: after a change of basis the numbers are others."""
        self._importance_P: Tensor | None = None
        self._uncertainty_P: Tensor | None = None

    def observe(self, pool: Pool) -> None:
        """Take the gradient of one optimizer step: normalised, reduced, not yet clipped."""
        assert pool.values.grad is not None
        found_P = (pool.values.detach() * pool.values.grad).abs()
        if self._importance_P is None or self._uncertainty_P is None:
            self._importance_P, self._uncertainty_P = torch.zeros_like(found_P), torch.zeros_like(found_P)
        self._importance_P.lerp_(found_P, 1 - self.DECAY)
        self._uncertainty_P.lerp_((found_P - self._importance_P).abs(), 1 - self.DECAY)

    def products(self, pool: Pool) -> list[tuple[Tensor, Tensor]]:
        """I·U as (a_CI, b_OC) of every layer; zeros before the first step."""
        if self._importance_P is None or self._uncertainty_P is None:
            return pool.views(torch.zeros_like(pool.values.detach()))
        return pool.views(self._importance_P * self._uncertainty_P)

    def select(self, keep_P: Tensor) -> None:
        """Forget the numbers that were removed; `keep_P` is boolean over those that were there."""
        if self._importance_P is not None and self._uncertainty_P is not None:
            self._importance_P, self._uncertainty_P = self._importance_P[keep_P], self._uncertainty_P[keep_P]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in another process."""
        if self._importance_P is None or self._uncertainty_P is None:
            return {}
        return {"importance": self._importance_P, "uncertainty": self._uncertainty_P}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self._importance_P, self._uncertainty_P = state.get("importance"), state.get("uncertainty")
