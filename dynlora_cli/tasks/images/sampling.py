"""Pictures drawn by a pipeline, with or without a VAE: a plain loop over its scheduler.

    pipeline = Pipeline(folder)
    model = load_denoiser(pipeline.folder / "unet", ...)      or a model with components on it
    pictures = sample(pipeline, model, ["a red fox"], steps=30, guidance=5.0, seed=0)

The first noise of a picture follows from the seed and its place, so the same prompts give comparable pictures.

Dimensions: B pictures, C channels, H lines and W columns of latents; of pixels R lines of R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynlora_cli.tasks.images.pipeline import XL, Conditions, Pipeline, denoised
from dynlora_cli.tasks.loss import evaluating

STEPS, GUIDANCE = 30, 5.0


def sample(
    pipeline: Pipeline,
    model: Any,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    side: int | None = None,
) -> NDArray[np.uint8]:
    """Draw a picture for each caption, all at once. [B, R, R, 3]

    Args:
        pipeline: of the model.
        model: its denoiser, in any mode.
        captions: what they are to show.
        steps: of the scheduler.
        guidance: how far to go from what is drawn without a caption towards what is drawn with it; 1: no further.
        seed: of all noise.
        side: pixels of a line; None: as the pipeline's config says.
    """
    given, none = pipeline.conditions(captions)
    return pipeline.pictures(
        drawn(pipeline, model, given, none, steps=steps, guidance=guidance, seed=seed, side=side or pipeline.side)
    )


@torch.no_grad()
def drawn(
    pipeline: Pipeline,
    model: Any,
    given: Conditions,
    none: Conditions,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    side: int,
    first: int = 0,
) -> Tensor:
    """The same by conditions that are known, as `Pipeline.conditions` gives them; latents, [B, C, H, W].

    Args:
        pipeline, model, steps, guidance, seed, side: as of `sample`.
        given: for each picture a row.
        none: without any caption, one row.
        first: place of the first picture among those that are drawn with this seed.
    """
    device, count = model.device, len(given["encoder_hidden_states"])
    scheduler = _fresh(pipeline, steps, device)
    places = range(first, first + count)
    makers = [torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63) for place in places]
    shape = pipeline.shape(side)
    noise = torch.stack([torch.randn(shape, generator=maker) for maker in makers]).to(device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    rows = _with_sizes(pipeline, given, count, side)
    if guidance != 1:
        empty = {name: one.expand(count, *one.shape[1:]) for name, one in none.items()}
        empty = _with_sizes(pipeline, empty, count, side)
        rows = {name: torch.cat([empty[name], rows[name]]) for name in rows}
    rows = {name: tensor.to(device) for name, tensor in rows.items()}
    takes_noise = {"generator": makers} if _takes_generator(scheduler) else {}
    with evaluating(model):
        for t in scheduler.timesteps:
            both = torch.cat([x, x]) if guidance != 1 else x
            if hasattr(scheduler, "scale_model_input"):
                both = scheduler.scale_model_input(both, t)
            said = denoised(model, both.to(model.dtype), t.expand(len(both)), rows).float()
            if guidance != 1:
                without, with_caption = said.chunk(2)
                said = without + guidance * (with_caption - without)
            x = scheduler.step(said, t, x, **takes_noise, return_dict=False)[0]
    return x


def _fresh(pipeline: Pipeline, steps: int, device: torch.device) -> Any:
    scheduler = pipeline.part("scheduler")
    scheduler = type(scheduler).from_config(scheduler.config)  # some remember the last pictures
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]


def _with_sizes(pipeline: Pipeline, given: Conditions, count: int, side: int) -> Conditions:
    if pipeline.kind != XL:
        return dict(given)
    return {**given, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * count, dtype=torch.float32)}
