"""The loss of a denoiser: the mean squared error of what it says of pictures with noise.

    loss = mean over rows + prior_weight · mean over the pictures of their class beside them        [DreamBooth]

The second only where rows have a prior (tasks/images/prior.py); as in the scripts of diffusers, min-SNR does not weight
it. Ruiz et al., DreamBooth, arXiv 2208.12242.

In training every row has one timestep, drawn anew in each pass. Measured rows are looked at with the same `LOOKS`
timesteps and the same noise every time, so that two measurements differ by the model alone.

Dimensions: B rows and those beside them, C channels, H lines and W columns of latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.data.examples import Judge
from dynlora_cli.tasks.images.example import noise
from dynlora_cli.tasks.images.noising import Noising
from dynlora_cli.tasks.images.pipeline import Conditions, denoised

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

LOOKS = 8  # timesteps that a measured row is looked at with
BANDS = 4  # equal parts of the schedule whose losses are told apart; 0 has the least noise


@dataclass(frozen=True)
class DenoisingJudge(Judge):
    """Judges batches of `Pictured` examples.

    Attributes:
        noising: of the pipeline.
        snr_gamma: of min-SNR, in training; None: every timestep counts alike.
        prior_weight: how much a picture of a prior counts, in training.
    """

    noising: Noising
    snr_gamma: float | None = None
    prior_weight: float = 1.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        extra = batch.extra
        given = _conditions(extra, "given.")
        for name, none in _conditions(extra, "none.").items():
            dropped_B = extra["dropped_B"].view(-1, *[1] * (none.ndim - 1))
            given[name] = torch.where(dropped_B, none, given[name])
        t_B = extra["timestep_B"]
        loss_B = self._of(model, extra["shown_BCHW"], extra["noise_BCHW"], t_B, given)
        # A picture of a prior is no target of its own: the sum is divided by the rows, as many as of these.
        loss_B = torch.where(
            extra["prior_B"], self.prior_weight * loss_B, self.noising.weight(t_B, self.snr_gamma) * loss_B
        )
        return loss_B.sum() if batch.supervised else 0.0 * loss_B.sum()

    def judged(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss_B = self.numbers(model, batch)["loss"]
        rows_B = torch.arange(len(loss_B), device=loss_B.device)
        return loss_B, rows_B, rows_B, rows_B

    def numbers(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss`, the mean over all looks, and those over the looks of each band."""
        extra, own_B = batch.extra, ~batch.extra["prior_B"]
        latents, seeds = extra["latents_BCHW"][own_B], extra["seed_B"][own_B].tolist()
        given = {name: rows[own_B] for name, rows in _conditions(extra, "given.").items()}
        looks = []
        for number, t in enumerate(self.noising.spread(LOOKS)):
            noises = [noise((seed + number) % 2**62, latents.shape[1:]) for seed in seeds]
            t_B = torch.full((len(latents),), t, device=latents.device)
            looks.append(self._of(model, latents, torch.stack(noises).to(latents.device), t_B, given))
        loss_LB = torch.stack(looks)
        if not batch.supervised:
            loss_LB = loss_LB[:, :0]
        bands = loss_LB.view(BANDS, LOOKS // BANDS, -1).mean(1)
        return {"loss": loss_LB.mean(0)} | {f"loss_band_{number}": bands[number] for number in range(BANDS)}

    def _of(self, model: Any, x: Tensor, noises: Tensor, t_B: Tensor, given: Conditions) -> Tensor:
        """The loss of every row, fp32, [B]."""
        noising = self.noising
        mixed = noising.mixed(x, noises, t_B).to(model.dtype)
        said = denoised(model, mixed, noising.told(t_B), given).float()
        return (said - noising.target(x, noises, t_B).float()).square().flatten(1).mean(1)


def _conditions(extra: dict[str, Tensor], of: str) -> Conditions:
    return {name.removeprefix(of): rows for name, rows in extra.items() if name.startswith(of)}
