"""How a pipeline mixes pictures with noise, and what its denoiser is to say of the mixture.

    epsilon, v_prediction, sample    sqrt(a_t) x + sqrt(1 - a_t) n, with the a_t of the pipeline's scheduler
    flow                             (1 - s) x + s n, with s = t / T

Dimensions: B rows, T timesteps of the schedule; x pictures (latents), n noise, t timesteps, 0 the least noise.

Source: Ho et al., Denoising Diffusion Probabilistic Models (arXiv 2006.11239); Salimans and Ho, Progressive
Distillation (arXiv 2202.00512), v; Hang et al., Min-SNR (arXiv 2303.09556); Esser et al., Scaling Rectified Flow
Transformers (arXiv 2403.03206), logit-normal timesteps and their shift.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dynlora_cli.errors import UsageError

FLOW = "FlowMatch"  # in the name of a scheduler
SAYS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noising:
    """The mixtures of a pipeline.

    Attributes:
        says: what its denoiser says: epsilon (the noise), v_prediction, sample (the picture), flow (noise - picture).
        steps: T.
        kept_T: a_t, the share of the picture's variance at each timestep; None for flow.
        shift: of flow: how far timesteps are moved to more noise.
    """

    says: str
    steps: int
    kept_T: Tensor | None = None
    shift: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Noising:
        """By the config of a scheduler, which `where` names.

        Raises:
            UsageError: it is of a kind that is not trained.
        """
        if FLOW in str(config.get("_class_name")):
            shift = config.get("shift", 1.0)
            if config.get("use_dynamic_shifting") or not isinstance(shift, (int, float)):
                shift = 1.0  # it depends on the size of what is drawn, and training draws at no single one
            return cls("flow", int(config.get("num_train_timesteps", 1000)), shift=float(shift))
        plain = DDPMScheduler.from_config(dict(config))
        says = plain.config.prediction_type
        if says not in SAYS:
            raise UsageError(f"{where}: prediction_type {says!r} is not trained", f"there are: {', '.join(SAYS)}")
        return cls(says, len(plain.alphas_cumprod), plain.alphas_cumprod.double())

    def drawn(self, chance: random.Random) -> float:
        """A timestep to train on: evenly from all; of flow, mostly from the middle of the way."""
        if self.kept_T is not None:
            return float(chance.randrange(self.steps))
        share = 1 / (1 + math.exp(-chance.gauss(0.0, 1.0)))
        return self.steps * self.shift * share / (1 + (self.shift - 1) * share)

    def spread(self, count: int) -> list[float]:
        """So many timesteps evenly over the schedule, from the least noise to the most."""
        found = [(number + 0.5) / count * self.steps for number in range(count)]
        return found if self.kept_T is None else [float(int(t)) for t in found]

    def told(self, t_B: Tensor) -> Tensor:
        """Timesteps as the denoiser is told them."""
        return t_B if self.kept_T is None else t_B.long()

    def mixed(self, x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Pictures with so much noise as their timesteps say."""
        of_x, of_noise = self._shares(x, t_B)
        return of_x * x + of_noise * noise

    def target(self, x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the denoiser is to say."""
        if self.says == "epsilon":
            return noise
        if self.says == "sample":
            return x
        if self.says == "flow":
            return noise - x
        of_x, of_noise = self._shares(x, t_B)
        return of_x * noise - of_noise * x

    def weight(self, t_B: Tensor, gamma: float | None) -> Tensor:
        """How much each row counts, [B]; with min-SNR rows of little noise count less.

        Args:
            t_B: timesteps.
            gamma: of min-SNR; None: all alike.
        """
        if gamma is None or self.kept_T is None:
            return torch.ones_like(t_B, dtype=torch.float32)
        kept_B = self.kept_T.to(t_B.device)[t_B.long()]
        snr_B = kept_B / (1 - kept_B)
        least_B = snr_B.clamp(max=gamma)
        divisor_B = {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": torch.ones_like(snr_B)}[self.says]
        return (least_B / divisor_B.clamp(min=1e-8)).float()

    def _shares(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of the picture and of the noise, shaped to be multiplied with x."""
        shape = (-1, *[1] * (x.ndim - 1))
        if self.kept_T is None:
            share = (t_B.double() / self.steps).to(x.dtype).view(shape)
            return 1 - share, share
        kept_B = self.kept_T.to(t_B.device)[t_B.long()]
        return kept_B.sqrt().to(x.dtype).view(shape), (1 - kept_B).sqrt().to(x.dtype).view(shape)
