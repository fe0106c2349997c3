"""The loss against the arithmetic of diffusers' training scripts, and pictures against those of its pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from latent_pipelines import write_pipeline
from PIL import Image
from tiny_pipeline import picture_recipe, write_pictures
from tiny_run import assembled
from torch.nn import functional as F

from dynlora_cli.errors import UsageError
from dynlora_cli.models.pipelines.denoiser import load_denoiser
from dynlora_cli.tasks.images.pipeline import Pipeline
from dynlora_cli.tasks.images.sampling import drawn


def stock(folder, kind):
    """The pipeline as diffusers loads it."""
    more = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / kind, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_batch(folder, kind, *overrides, **scheduler):
    """The first micro-batch of a run on pictures of the pipeline's own size, and its judge's loss of it."""
    write_pictures(folder / "pictures", size=(16, 16))
    base = write_pipeline(kind, folder, **scheduler)
    recipe = picture_recipe(folder, "train.micro_batch_size=4", *overrides, base=base)
    run = assembled(recipe, fill=False)
    batch = run.batches.step(0, 0)[0]
    with torch.no_grad():
        return batch, run.objective.loss(run.model, batch)


def seen_by(pipe, batch):
    """Latents and captions of a batch, by the pipeline's own parts."""
    pixels = [np.asarray(Image.open(one.picture.content).convert("RGB")) for one in batch.examples]
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean
    latents = (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    return latents, [one.caption for one in batch.examples]


@torch.no_grad()
@pytest.mark.parametrize(("says", "gamma"), [("epsilon", None), ("epsilon", 5.0), ("v_prediction", None)])
def test_the_loss_of_stable_diffusion(tmp_path, says, gamma):
    options = ["model.caption_dropout=0", *([f"model.snr_gamma={gamma}"] if gamma else [])]
    batch, loss = first_batch(tmp_path, "sd", *options, prediction_type=says)
    pipe = stock(tmp_path, "sd")
    plain = diffusers.DDPMScheduler.from_pretrained(tmp_path / "sd" / "scheduler")
    latents, captions = seen_by(pipe, batch)
    states, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    noise, t = batch.extra["noise_BCHW"], batch.extra["timestep_B"].long()
    said = pipe.unet(plain.add_noise(latents, noise, t), t, states).sample
    target = noise if says == "epsilon" else plain.get_velocity(latents, noise, t)
    wanted = F.mse_loss(said, target, reduction="none").mean((1, 2, 3))
    if gamma:
        snr = compute_snr(plain, t)
        wanted = wanted * snr.clamp(max=gamma) / snr
    assert loss.item() == pytest.approx(wanted.sum().item(), rel=1e-5)


@torch.no_grad()
def test_the_loss_of_sdxl(tmp_path):
    batch, loss = first_batch(tmp_path, "xl", "model.caption_dropout=0")
    pipe = stock(tmp_path, "xl")
    plain = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    latents, captions = seen_by(pipe, batch)
    states, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]] * len(captions))
    noise, t = batch.extra["noise_BCHW"], batch.extra["timestep_B"].long()
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    said = pipe.unet(plain.add_noise(latents, noise, t), t, states, **more).sample
    assert loss.item() == pytest.approx(F.mse_loss(said, noise).item() * len(captions), rel=1e-5)


def test_a_flow_takes_no_min_snr(tmp_path):
    with pytest.raises(UsageError, match="snr_gamma weighs timesteps"):
        first_batch(tmp_path, "sd3", "model.snr_gamma=5")


@torch.no_grad()
def test_the_loss_of_a_flow(tmp_path):
    batch, loss = first_batch(tmp_path, "sd3", "model.caption_dropout=0")
    pipe = stock(tmp_path, "sd3")
    latents, captions = seen_by(pipe, batch)
    states, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    noise, t = batch.extra["noise_BCHW"], batch.extra["timestep_B"]
    assert len(set(t.tolist())) == len(t)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    mixed = sigma * noise + (1 - sigma) * latents
    said = pipe.transformer(mixed, states, pooled, t, return_dict=False)[0]
    assert loss.item() == pytest.approx(F.mse_loss(said, noise - latents).item() * len(captions), rel=1e-5)


@torch.no_grad()
def test_captions_that_are_dropped_are_what_a_pipeline_draws_without_one_by(tmp_path):
    batch, loss = first_batch(tmp_path, "sd", "model.caption_dropout=1")
    pipe = stock(tmp_path, "sd")
    plain = diffusers.DDPMScheduler.from_pretrained(tmp_path / "sd" / "scheduler")
    latents, captions = seen_by(pipe, batch)
    _, empty = pipe.encode_prompt(captions, "cpu", 1, True)
    noise, t = batch.extra["noise_BCHW"], batch.extra["timestep_B"].long()
    said = pipe.unet(plain.add_noise(latents, noise, t), t, empty).sample
    assert loss.item() == pytest.approx(F.mse_loss(said, noise).item() * len(captions), rel=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3"])
def test_pictures_are_those_of_the_pipeline(tmp_path, kind):
    base = write_pipeline(kind, tmp_path)
    pipe, own = stock(tmp_path, kind), Pipeline(base)
    captions = ["a red box", "two green dots"]
    given, none = own.conditions(captions)
    part = "transformer" if kind == "sd3" else "unet"
    model = load_denoiser(base / part, torch.float32, torch.device("cpu"))
    found = drawn(own, model, given, none, steps=4, guidance=3.0, seed=7, side=16)
    makers = [torch.Generator().manual_seed(7 * 1_000_003 + place) for place in range(2)]
    noise = torch.stack([torch.randn(own.shape(16), generator=maker) for maker in makers])
    more = {"latents": noise, "height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 4}
    wanted = pipe(captions, guidance_scale=3.0, generator=makers, **more).images
    assert torch.allclose(found, wanted, atol=1e-5)
    assert own.pictures(found).shape == (2, 16, 16, 3)
