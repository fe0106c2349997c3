"""Observers that read the gradient of the ordinary backward pass, and average what it says between events.

    GateGradients    one number per component: the gradient of a gate that multiplies it
    EntryAverages    AdaLoRA's averages, of every single number of the pool

Dimensions: K components of the pool, P numbers of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.policy import Observer

# In training the averages forget over about 20 steps.
DECAY = 0.95


class GateGradients(Observer):
    """Running averages of dL/dg of every component and of its square, since the last change of basis.

    g is a gate that would multiply the component; it is always 1. Its gradient follows from the gradients that exist:
    dL/dg_i = <a_i, dL/da_i>.

    Attributes:
        decay: weight of the past in each step's average; None: all steps count alike.
        steps: optimizer steps observed.
        targets: supervised tokens (or rows) of an optimizer step, averaged.
    """

    name = "gradients"

    def __init__(self, decay: float | None = DECAY) -> None:
        self.decay = decay
        super().__init__()

    @classmethod
    def of(cls, *, training: bool) -> GateGradients:
        """In training recent steps count more, for the components change; after it all rows count alike."""
        return cls(DECAY if training else None)

    def restart(self) -> None:
        super().restart()
        self.steps = 0
        self.targets = 0.0

    def observe(self, pool: Pool, targets: float) -> None:
        """Take the gate gradients of one optimizer step into the averages.

        A component of an expert that no token of the step was sent to has gradient 0, and that 0 counts. The score
        stands for how much the mean loss over all tokens rises when the component goes, and an expert that is needed
        half as often adds half as much to that. Averages over only the steps in which an expert was used would give
        rare experts as many components as common ones.
        """
        gradient_K = pool.gate_gradient_K()
        self.steps += 1
        self.targets += (targets - self.targets) / self.steps
        weight = 1 / self.steps if self.decay is None else 1 - self.decay
        self.seen["mean"] = self.get("mean", pool).lerp(gradient_K, weight)
        self.seen["square"] = self.get("square", pool).lerp(gradient_K.square(), weight)

    def mean(self, pool: Pool) -> Tensor:
        """Average of dL/dg, corrected for the zeros it began with; zeros before the first step. [K]"""
        return self._unbiased("mean", pool)

    def square(self, pool: Pool) -> Tensor:
        """Average of (dL/dg)², likewise. [K]"""
        return self._unbiased("square", pool)

    def removal_K(self, pool: Pool) -> Tensor:
        """Change of the loss when one gate goes from 1 to 0, to second order: -g_i + ½ h_i. [K]

        The curvature h_i is taken from the diagonal of the empirical Fisher information: the variance of the step's
        mean gradient times the number of targets it is the mean of.
        """
        mean = self.mean(pool)
        curvature = self.targets * (self.square(pool) - mean.square()).clamp_min(0) + mean.square()
        return 0.5 * curvature - mean

    def predicted_loss_change(self, removed_K: Tensor, pool: Pool) -> float | None:
        """The sum of `removal_K`, as if components did not interact. None before the first step."""
        return self.removal_K(pool)[removed_K].sum().item() if self.steps else None

    def _unbiased(self, key: str, pool: Pool) -> Tensor:
        share = 1.0 if self.decay is None or not self.steps else 1 - self.decay**self.steps
        return self.get(key, pool) / share

    def state_dict(self) -> dict[str, Tensor]:
        if not self.seen:
            return {}
        return {**self.seen, "counters": torch.tensor([self.steps, self.targets], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.seen:
            steps, self.targets = self.seen.pop("counters").tolist()
            self.steps = int(steps)


class EntryAverages(Observer):
    """Running averages for every single number w of the pool: I = |w · dL/dw|, and U = |I - average of I|.

    `seen` holds both as tensors [P].

    Source: AdaLoRA (arXiv 2303.10512), equations 8 to 10.
    """

    name = "entries"
    DECAY = 0.85

    def observe(self, pool: Pool, targets: float) -> None:  # noqa: ARG002
        """Take the gradient of one optimizer step into the averages."""
        assert pool.values.grad is not None
        found_P = (pool.values.detach() * pool.values.grad).abs()
        if not self.seen:
            self.seen = {"importance": torch.zeros_like(found_P), "uncertainty": torch.zeros_like(found_P)}
        importance_P, uncertainty_P = self.seen["importance"], self.seen["uncertainty"]
        importance_P.lerp_(found_P, 1 - self.DECAY)
        uncertainty_P.lerp_((found_P - importance_P).abs(), 1 - self.DECAY)

    def products(self, pool: Pool) -> list[tuple[Tensor, Tensor]]:
        """I·U as (a_CI, b_OC) of every layer; zeros before the first step."""
        if not self.seen:
            return pool.views(torch.zeros_like(pool.values.detach()))
        return pool.views(self.seen["importance"] * self.seen["uncertainty"])

    def select(self, pool: Pool, keep_K: Tensor) -> None:
        keep_P = pool.numbers_P(keep_K)
        self.seen = {key: value_P[keep_P] for key, value_P in self.seen.items()}
